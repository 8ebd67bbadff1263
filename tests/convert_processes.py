"""What test_convert.py does in processes of their own. Nothing here may import the package before it is called."""

import json
import sys
from pathlib import Path

from load_without_package import _PackageIsAbsent

# What both have to import anyway; they are forked from a process that has.
IMPORTS = (
    "import torch; from transformers import AutoModel, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration; "
    "import convert_processes"
)
COMMAND = "getattr(convert_processes, sys.argv[0])(*sys.argv[1:])"


def measure_memory(small: str, source: str, output: str) -> None:
    """Converts a small checkpoint, so that all code is loaded, and then one that counts; prints what that took."""
    from adavtp.hub_cards.convert import convert_checkpoint

    convert_checkpoint(small, f"{output}-small")
    # ru_maxrss would not do: a process has it from the one that started it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    done = convert_checkpoint(source, output)
    grown = _resident("VmHWM") - before
    print(json.dumps({"grown": grown, "reported": done.peak_memory, "bytes": done.bytes}))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def answer_without_package(folder: str, picture: str, question: str) -> None:
    """Loads a folder where the package cannot be imported, asks, and prints the answer."""
    sys.meta_path.insert(0, _PackageIsAbsent())
    from PIL import Image
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    print(json.dumps(model.generate(Image.open(Path(picture)), question, token_budget=0.4, max_new_tokens=6)))
    assert not [name for name in sys.modules if name.partition(".")[0] == "adavtp"]
