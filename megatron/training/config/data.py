"""Flags about training data and its loading."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class DataConfig:
    """Which files are read and how samples are made of them."""

    # fmt: off
    data_path: list[str] | None = flag(
        None, parse=None, nargs="*", group="data and dataloader",
        help="Prefix of one dataset, or several, each preceded by its weight, blended and split by --split.")
    renormalize_blend_weights: bool = flag(
        False, group="data and dataloader",
        needs="--data-path or --train-data-path",
        help="Correct blend weights so that no dataset needs more samples than its share promises.")
    split: str | None = flag(
        None, group="data and dataloader", unless="--mock-data",
        help="Shares of documents for training, validation and test, such as 90,5,5; default 969, 30, 1.")
    train_data_path: list[str] | None = flag(
        None, parse=None, nargs="*", group="data and dataloader", help="Like --data-path, for training alone.")
    valid_data_path: list[str] | None = flag(
        None, parse=None, nargs="*", group="data and dataloader", help="Like --data-path, for validation alone.")
    test_data_path: list[str] | None = flag(
        None, parse=None, nargs="*", group="data and dataloader", help="Like --data-path, for the test alone.")
    data_cache_path: str | None = flag(
        None, parse=None, group="data and dataloader",
        help="Directory for sample indices; default a folder beside the data.")
    mmap_bin_files: bool = flag(
        True, off="--no-mmap-bin-files", group="data and dataloader",
        unless="--mock-data", help="Read .bin files instead of mapping them.")
    mock_data: bool = flag(
        False, group="data and dataloader", help="Train on generated samples, to try things out without files.")
    seq_length: int | None = flag(None, group="data and dataloader", help="Tokens per sample.")
    encoder_seq_length: int | None = flag(
        None, group="data and dataloader", help="Tokens per encoder sample; another name for --seq-length.")
    decoder_seq_length: int | None = flag(None, group="data and dataloader", help="Tokens per decoder sample of T5.")
    mask_prob: float = flag(0.15, group="data and dataloader", help="Share of tokens masked for BERT and T5.")
    short_seq_prob: float = flag(
        0.1, group="data and dataloader", help="Share of BERT samples that are made shorter than the sequence.")
    num_workers: int = flag(2, group="data and dataloader", help="Loader processes per rank; 0 loads in the main one.")
    reset_position_ids: bool = flag(
        False, group="data and dataloader", unless="--position-embedding-type rope or --position-embedding-type none",
        help="Count positions anew after every end-of-document token.")
    reset_attention_mask: bool = flag(
        False, group="data and dataloader", help="Let no token attend across an end-of-document token.")
    eod_mask_loss: bool = flag(
        False, group="data and dataloader", help="Leave predictions after end-of-document tokens out of the loss.")
    create_attention_mask_in_dataloader: bool = flag(
        True, off="--no-create-attention-mask-in-dataloader", group="data and dataloader",
        help="Do not build attention masks with the samples; attention builds its own.")
    num_dataset_builder_threads: int = flag(
        1, group="data and dataloader", unless="--mock-data", help="Threads that open the datasets of a blend.")
    s3_cache_path: str | None = flag(
        None, group="data and dataloader",
        unless="--mock-data", help="Directory for index files of datasets in object storage.")
    dataloader_type: str | None = flag(
        None, choices=("single", "cyclic", "external"), group="training",
        help="One pass in order (single, the default), endless shuffled passes (cyclic), or an iterator of your own.")
    data_sharding: bool = flag(
        True, off="--no-data-sharding", group="data and dataloader",
        needs="--dataloader-type cyclic",
        help="Shuffle over all data instead of within each data-parallel rank's share.")
    # fmt: on
