"""What this package is: its version, and the fields of its metadata under their known names."""

MAJOR, MINOR, PATCH = 1, 0, 0
PRE_RELEASE = ""

__shortversion__ = f"{MAJOR}.{MINOR}.{PATCH}"
__version__ = __shortversion__ + PRE_RELEASE
#: The release of Megatron-LM whose command line, data files and checkpoints are the compatibility contract.
__compatible_with__ = "core_v0.9.0"

__package_name__ = "megatron-cli"
__description__ = "Megatron-style pretraining that runs every parallel layout on a laptop and on a cluster"
__keywords__ = (
    "deep learning, language models, distributed training, tensor parallelism, pipeline parallelism"
)
__contact_names__ = ""
__contact_emails__ = ""
__homepage__ = ""
__repository_url__ = ""
__download_url__ = ""
__license__ = ""
