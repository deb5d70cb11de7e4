"""Settings of all tests."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when trackio is first imported, by whichever test
os.environ["STS_LEDGER"] = ""  # no test is to be counted among the user's runs, or to see those of another test
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another
