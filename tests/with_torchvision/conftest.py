"""
What needs torchvision: processors that read videos, and what stands on them.

transformers looks for torchvision once, and the other tests are those of a machine without it. So these are a run of
pytest of their own, which `tests/test_with_torchvision.py` starts; or `pytest tests/with_torchvision`.
"""

import sys

import pytest

from torchvision_beside import provide_torchvision

if "transformers" in sys.modules or not provide_torchvision():
    pytest.exit("These tests need torchvision, and a process in which transformers was not imported without it.", 5)
