from collections.abc import Iterator

import pytest

from forked_processes import Forks

# Of the processes that tests of training begin, together; importing them takes longer than most of what they do.
IMPORTS = "import deepspeed, training_process, adavtp.command_line; from forked_processes import call"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Processes that have imported what training needs. Their arguments are those of [`call`]."""
    with Forks(IMPORTS, "call(*sys.argv)", {"DS_ACCELERATOR": "cpu"}) as forks:
        yield forks
