"""Writes the code of the reference checkpoints beside their weights; git keeps only the weights.

`make demo` and `make test` run it, so that `AutoModel.from_pretrained("hub_cards/adavtp-pages",
trust_remote_code=True)` works in a script that never imports this package, as with any folder that was exported.
"""

from pathlib import Path

from ..modeling.hub.saving import AUTO_MAP, CODE_FOLDER, save_code
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor

# What transformers says of a folder without code is that it has no file of the name in the configuration. In the
# reference's configurations that is a file which only leads to the classes, and whose name says where they come from.
LEADING_FILE = "Written by make demo and make test"
_LEADING = """from .configuration_adavtp import AdaVTPConfig
from .processing_adavtp import AdaVTPProcessor

__all__ = ["AdaVTPConfig", "AdaVTPProcessor"]
"""


def write_reference_code() -> None:
    """Brings the code in `hub_cards/adavtp-*/adavtp_code/` up to date."""
    for folder in Path(__file__).resolve().parent.glob("adavtp-*"):
        save_code(AdaVTPForConditionalGeneration, folder)
        save_code(AdaVTPProcessor, folder)
        (folder / CODE_FOLDER / f"{LEADING_FILE}.py").write_text(_LEADING, encoding="utf-8")


def led_directly(configuration: str) -> str:
    """The text of a configuration file with the classes' own files in place of the leading one."""
    for reference in (AUTO_MAP["AutoConfig"], AUTO_MAP["AutoProcessor"]):
        leading = f"{CODE_FOLDER}/{LEADING_FILE}.{reference.rpartition('.')[2]}"
        configuration = configuration.replace(leading, reference)
    return configuration


if __name__ == "__main__":
    write_reference_code()
