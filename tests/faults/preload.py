"""Imported by the forkserver, once for all children: everything that is slow to import, also by the main module."""

import gc

import pytest  # noqa: F401
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401
from faults import attacks  # noqa: F401

from wake2vec import doctor, keeping, outlook, plots, report, resume, trackers, train  # noqa: F401

gc.freeze()  # or the first collection in every child copies all of these pages
