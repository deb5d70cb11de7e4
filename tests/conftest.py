"""Settings of all tests."""

import gc
import os
import tempfile

# Tiny tensors: more threads would only wait for one another, and every core has a test process; also in processes of tests.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when trackio is first imported, by whichever test
os.environ["STS_LEDGER"] = ""  # no test is to be counted among the user's runs, or to see those of another test
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)  # also where torch was imported before this file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("gemma") is None)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Each training collects garbage, and would look through all that was ever imported: half the time of a tiny run."""
    gc.collect()
    gc.freeze()
