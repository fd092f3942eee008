"""Vectors of texts by a BERT: in memory, or in blocks on a disk by all data-parallel ranks."""

from tools.bert_embedding.disk import DiskDataParallelBertEmbedder
from tools.bert_embedding.embed import BertEmbedder

__all__ = ["BertEmbedder", "DiskDataParallelBertEmbedder"]
