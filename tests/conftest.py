import os

import pytest
import torch

torch.set_num_threads(
    1
)  # test processes run side by side, and threads that wait for each other stall


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let no test read or leave what another measured."""
    os.environ["GRAPHPRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
