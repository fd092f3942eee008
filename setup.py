"""Packaging: `pip install .` installs the library, the training shell and the console scripts."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
PACKAGE_INFO: dict[str, str] = {}
exec((HERE / "megatron/core/package_info.py").read_text(encoding="utf-8"), PACKAGE_INFO)

#: The fast byte-level BPE engine where it has a wheel; elsewhere a slower one gives the same ids.
GIGATOKEN = "gigatoken>=0.10; platform_machine in 'x86_64 AMD64 aarch64 arm64'"
EXTRAS = {
    "gpu": ["triton"],
    "te": ["transformer-engine[pytorch]"],
    "flash-attn": ["flash-attn"],
    "eval": ["transformers", "safetensors", "nltk"],
    "data": ["pyarrow", "fsspec", "nltk"],
    "clean": ["ftfy", "langdetect", "tldextract"],
    "embed": ["h5py", "transformers"],
    "tokenizers": ["sentencepiece", "protobuf", "tiktoken", "transformers"],
    "wandb": ["wandb"],
    "plot": ["matplotlib"],
    "ray": ["ray"],
    "serve": ["flask"],
}
EXTRAS["dev"] = sorted(
    {
        *EXTRAS["eval"],
        *EXTRAS["data"],
        *EXTRAS["clean"],
        *EXTRAS["embed"],
        *EXTRAS["plot"],
        *EXTRAS["serve"],
        *EXTRAS["tokenizers"],
        *EXTRAS["gpu"],
        "hypothesis",
        "import-linter",
        "mypy",
        "pytest",
        "pytest-xdist",
        "ruff",
        "types-PyYAML",
    }
)

setup(
    name=PACKAGE_INFO["__package_name__"],
    version=PACKAGE_INFO["__version__"],
    description=PACKAGE_INFO["__description__"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["megatron", "megatron.*"]),
    package_data={"megatron.inference": ["static/*.html"]},
    py_modules=["pretrain_gpt", "pretrain_bert", "pretrain_t5", "pretrain_mamba"],
    install_requires=[
        "torch>=2.9",  # 2.7 cannot average over gloo
        "numpy",
        "tqdm",
        "pyyaml",
        "tensorboard",
        "regex",
        "tokenizers",
        GIGATOKEN,
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "pretrain-gpt = pretrain_gpt:main",
            "pretrain-bert = pretrain_bert:main",
            "pretrain-t5 = pretrain_t5:main",
            "pretrain-mamba = pretrain_mamba:main",
            "preprocess-data = megatron.training.preprocessing.pipeline:main",
            "train-tokenizer = megatron.training.preprocessing.vocabulary:main",
        ]
    },
)
