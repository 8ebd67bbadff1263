"""
What needs torchvision: processors that read videos, and what stands on them.

transformers looks for torchvision once, when it is imported, and the other tests are those of a machine without it. So
these are a run of pytest of their own, which `tests/test_with_video_packages.py` starts.
"""

import sys

import pytest

from video_packages import provide_video_packages

if "transformers" in sys.modules or not provide_video_packages():
    pytest.exit("These tests need torchvision, and a process in which transformers was not imported without it.", 5)
