"""Loads folders where the package cannot be imported and says what they do. Run by test_hub_folder.py.

Usage: python load_without_package.py FOLDER RANDOM_FOLDER PROCESSOR_FOLDER OUTPUT_FOLDER
"""

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class _PackageIsAbsent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "adavtp":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


QUESTION = "what colour is the 7 ?"
BUDGET = 0.4


def answers(model: Any, processor: Any, image: Image.Image) -> dict[str, Any]:
    """What a model says at a budget, in both forms of `generate`, and at its default budget."""
    inputs = processor.of_questions(image, QUESTION)
    return {
        "text": model.generate(image, QUESTION, token_budget=BUDGET),
        "ids": model.generate(**inputs, token_budget=BUDGET).tolist(),
        "default": model.generate(**inputs).tolist(),
        "kept": model.select_tokens(**inputs, token_budget=BUDGET).keep.nonzero()[:, 1].tolist(),
    }


def piped(folder: str, image: Image.Image) -> str:
    """What transformers' pipeline says at a budget."""
    from transformers import pipeline

    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    (result,) = pipe(
        text=[{"role": "user", "content": content}],
        return_full_text=False,
        generate_kwargs={"token_budget": BUDGET},
    )
    return result["generated_text"].strip()


def main(folder: str, random_folder: str, processor_folder: str, output: str) -> None:
    sys.meta_path.insert(0, _PackageIsAbsent())
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    image = Image.open(Path(folder) / "image.png")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    alone = AutoProcessor.from_pretrained(processor_folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    again = Path(output) / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    results = {
        "reducer": config.reducer,
        "visual_position_ids": config.visual_position_ids,
        "classes": [f"{type(part).__module__}.{type(part).__name__}" for part in (config, processor, model)],
        "auto_model": answers(model, processor, image),
        "image_text_to_text": answers(
            AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True), processor, image
        ),
        "processor_alone": torch.equal(
            alone.of_questions(image, QUESTION)["input_ids"], processor.of_questions(image, QUESTION)["input_ids"]
        ),
        "pipeline": piped(folder, image),
        "random": answers(AutoModel.from_pretrained(random_folder, trust_remote_code=True), processor, image),
        "again": answers(AutoModel.from_pretrained(again, trust_remote_code=True), processor, image),
        "package_modules": [name for name in sys.modules if name.partition(".")[0] == "adavtp"],
    }
    (Path(output) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
