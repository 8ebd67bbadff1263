"""The Space: what its page shows in a real browser, what it counts, and the folder that goes to the Hub."""

import ast
import html
import importlib.util
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from io import BytesIO
from math import floor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
from typer.testing import CliRunner

from adavtp import AdaVTPForConditionalGeneration
from adavtp.command_line import app
from adavtp.hub_cards.space_folder import SPACE, space_folder
from adavtp.modeling.budget.selection import Selection
from counted_flops import ON_A_CPU
from repository import DIGITS, ROOT
from tiny_processors import family_folder

SCENE = ROOT / "docs" / "scene.png"
QUESTION = "Which digit is red?"
NUM_PATCHES, PATCH_SIZE, DROPPED = 144, 8, 0.18

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
NEEDS_GRADIO = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
# Milliseconds that the page may take for anything.
PATIENCE = 20_000


# -- the page ---------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """A browser's page, and what it asked the network for and complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#image input[type=file]", path)
        self.page.wait_for_selector("#image img", timeout=PATIENCE)

    def ask(self, question: str) -> None:
        self.page.get_by_label("Question").fill(question)
        self.page.get_by_role("button", name="Ask").click()

    def drag_to(self, fraction: float) -> float:
        """Drags the slider's handle there, and returns the budget that it then says."""
        box = self.page.locator("#budget input[type=range]").bounding_box()
        middle = box["y"] + box["height"] / 2
        budget = self.budget()
        # Handles do not overhang: they move between half their width from either end.
        x = [box["x"] + 8 + where * (box["width"] - 16) for where in (budget, fraction)]
        self.page.mouse.move(x[0], middle)
        self.page.mouse.down()
        self.page.mouse.move(x[1], middle, steps=5)
        self.page.mouse.up()
        return self.budget()

    def choose(self, reducer: str) -> None:
        self.page.locator("#reducer input").click()
        self.page.get_by_role("option", name=reducer).click()

    def budget(self) -> float:
        return float(self.page.input_value("#budget input[type=number]"))

    def wait_for_cost_of(self, tokens: int) -> None:
        """Until cost and picture are those of so many tokens, and nothing moves any more."""
        self.page.wait_for_function(
            """([tokens, all]) => {
                const picture = document.querySelector("#picture img");
                const cell = document.querySelector("#cost tbody td");
                const is_shown = picture?.complete && picture.alt.includes(`all but ${tokens} of ${all} `);
                return is_shown && cell?.innerText === `${tokens}`;
            }""",
            arg=[tokens, NUM_PATCHES],
            timeout=PATIENCE,
        )

    def answer(self) -> str:
        return self.page.input_value("#answer textarea")

    def cost(self) -> dict[str, list[str]]:
        """The table of costs: a row's name and its cells."""
        rows = self.page.locator("#cost tbody tr").all()
        return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}

    def picture(self) -> bytes:
        return self.page.request.get(self.page.get_attribute("#picture img", "src")).body()

    def sentence(self) -> str:
        return self.page.get_by_role("alert").filter(has_text=".").inner_text(timeout=PATIENCE)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of `adavtp space` in a process of its own; the way to any other machine is a socket of ours."""
    for module in ("gradio", "playwright"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the page is tested with {module}, which is not installed")
    if CHROMIUM is None:
        pytest.skip("the page is tested in Chromium, and there is no chromium, chromium-browser or google-chrome")
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_server(("127.0.0.1", 0)) as free:
        port, elsewhere = free.getsockname()[1], f"http://127.0.0.1:{proxy.getsockname()[1]}"
        free.close()
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), elsewhere)
        own = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "adavtp.command_line", "space", str(DIGITS), "--trust-remote-code", "--port"]
        command.append(str(port))
        # Outside the repository: the page must not live on what lies around.
        process = subprocess.Popen(
            command, env=os.environ | proxies | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_for(address, process)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=20)
        # Whoever leaves this machine knocks here.
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def _wait_for(address: str, process: subprocess.Popen) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # A machine that is busy with other tests takes its time.
    for _ in range(1200):
        if process.poll() is not None:
            pytest.fail(f"`adavtp space` ended with {process.returncode}: {process.stdout.read()}")
        try:
            opener.open(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("`adavtp space` serves no page after two minutes.")


@pytest.fixture(scope="module")
def browser(served: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, served: str) -> Iterator[Visit]:
    """
    The page as a visitor first meets it. Whatever is done there, the browser has nothing to complain about, and asks
    nothing of any other machine.
    """
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    visit = Visit(context.new_page())
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    visit.page.on("console", lambda said: visit.complaints.append(said.text) if said.type == "error" else None)
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.goto(served)
    visit.page.wait_for_selector("#budget", timeout=PATIENCE)
    yield visit
    context.close()
    assert visit.complaints == []
    assert visit.requests and all(url.startswith((served, "data:", "blob:")) for url in visit.requests)


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """Model and processor, as any user loads them."""
    model = AutoModel.from_pretrained(DIGITS, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(DIGITS, trust_remote_code=True)


def first_example() -> tuple[Image.Image, str]:
    """The image and the question of the page's first button; no digits, so the answer is whatever the model says."""
    (image, question), *_ = json.loads((SPACE / "examples" / "questions.json").read_text())
    return Image.open(SPACE / "examples" / image), question


def tokens_of(budget: float) -> int:
    """K = floor(b N), and one at least."""
    return max(1, floor(Fraction(str(budget)) * NUM_PATCHES))


def picture_of(keep: torch.Tensor) -> np.ndarray:
    """The scene, of the size that the model wants, with its dropped patches dark: `[96, 96, 3]`."""
    scene = np.asarray(Image.open(SCENE).convert("RGB"), dtype=np.float64)
    return scene * np.kron(np.where(keep.reshape(12, 12), 1.0, DROPPED), np.ones((PATCH_SIZE, PATCH_SIZE)))[..., None]


def test_moving_the_slider_changes_answer_picture_and_cost(visit: Visit, reference: tuple[Any, Any]) -> None:
    model, processor = reference
    image = Image.open(SCENE)
    inputs = processor.of_questions(image, QUESTION)
    visit.upload(SCENE)
    visit.ask(QUESTION)
    visit.wait_for_cost_of(57)
    length = inputs["input_ids"].shape[1]
    cost = visit.cost()
    assert cost["Visual tokens"] == ["57", "144", "40%"]
    assert cost["Prompt, tokens"] == [str(length - 87), str(length), f"{100 * (length - 87) / length:.0f}%"]
    here, full = (torch_flops(model.config.text_config, columns) for columns in (length - 87, length))
    assert cost["Prefill, FLOPs"][2] == f"{100 * here / full:.0f}%"
    assert cost["Prefill, FLOPs"][0] == f"{here / 1e6:.3g} M"
    assert all(float(milliseconds) > 0 for milliseconds in cost["Time, ms"][:2])
    assert "At full budget the answer is: 1" in visit.page.inner_text("#cost")

    shown = []
    for where in (1.0, 0.3, 0.0):
        budget = visit.drag_to(where)
        assert budget == pytest.approx(where, abs=0.03)
        tokens = tokens_of(budget)
        visit.wait_for_cost_of(tokens)
        assert visit.answer() == model.generate(image, QUESTION, token_budget=budget, do_sample=False)
        keep = model.select_tokens(**inputs, token_budget=budget).keep[0]
        assert keep.sum() == tokens
        picture = visit.picture()
        pixels = np.asarray(Image.open(BytesIO(picture)), dtype=np.float64)
        assert pixels.shape == (480, 480, 3)
        # Every pixel of the image is a square of 5 x 5 of the picture; what is shown is rounded.
        np.testing.assert_allclose(pixels, picture_of(keep).repeat(5, axis=0).repeat(5, axis=1), atol=1.0)
        assert f"{tokens} of {NUM_PATCHES}" in visit.page.inner_text("#kept")
        shown.append((visit.answer(), picture))

    assert [answer for answer, _ in shown] == ["1", "1", "2"]
    assert len({picture for _, picture in shown}) == 3


def test_another_reducer_keeps_other_patches_and_what_cannot_be_answered_is_said_in_a_sentence(
    visit: Visit, reference: tuple[Any, Any]
) -> None:
    visit.page.get_by_role("button", name="Ask").click()
    assert visit.sentence() == "There is no image yet. Upload one first."
    visit.upload(SCENE)
    visit.ask("  ")
    visit.page.get_by_text("There is no question yet.").wait_for(timeout=PATIENCE)
    visit.ask(QUESTION)
    visit.wait_for_cost_of(57)
    assert visit.page.inner_text("#message").strip() == ""
    before = visit.picture()
    visit.choose("grid")
    visit.page.wait_for_function(
        "(src) => ![null, src].includes(document.querySelector('#picture img')?.src ?? null)",
        arg=visit.page.get_attribute("#picture img", "src"),
        timeout=PATIENCE,
    )
    after = visit.picture()
    assert after != before
    model, processor = reference
    inputs = processor.of_questions(Image.open(SCENE), QUESTION)
    keep = model.select_tokens(**inputs, token_budget=0.4, reducer="grid").keep[0]
    pixels = np.asarray(Image.open(BytesIO(after)), dtype=np.float64)
    np.testing.assert_allclose(pixels[2::5, 2::5], picture_of(keep), atol=1.0)
    # Of four layers the first sees everything, so that a twentieth cannot be had.
    visit.choose("fastv")
    visit.drag_to(0.05)
    visit.page.get_by_text("'fastv' cannot go below").wait_for(timeout=PATIENCE)
    assert visit.page.locator("#cost table").count() == 0
    assert visit.page.locator("#picture img").count() == 0


def test_the_keyboard_will_do(visit: Visit, reference: tuple[Any, Any]) -> None:
    image, asked = first_example()
    visit.page.get_by_role("button", name=asked).press("Enter")
    visit.wait_for_cost_of(57)
    assert visit.answer() == reference[0].generate(image, asked, token_budget=0.4, do_sample=False)
    slider = visit.page.get_by_role("slider", name="Token budget")
    slider.press("ArrowRight")
    visit.wait_for_cost_of(tokens_of(0.41))
    slider.press("End")
    visit.wait_for_cost_of(NUM_PATCHES)
    question = visit.page.get_by_label("Question")
    question.fill("How many digits are there?")
    # What is shown belongs to the question above it.
    visit.page.wait_for_selector("#cost table", state="detached", timeout=PATIENCE)
    assert visit.answer() == ""
    question.press("Enter")
    visit.page.get_by_text("How many digits are there? Budget 1").wait_for(timeout=PATIENCE)
    assert visit.answer() == reference[0].generate(image, "How many digits are there?", do_sample=False)
    number = visit.page.get_by_role("spinbutton", name="Token budget")
    number.fill("0.29")
    number.press("Enter")
    visit.wait_for_cost_of(41)


def test_requests_do_not_pile_up(visit: Visit) -> None:
    visit.upload(SCENE)
    visit.ask(QUESTION)
    visit.wait_for_cost_of(57)
    before = sum("queue/join" in url for url in visit.requests)
    visit.page.evaluate(
        """async () => {
            const slider = document.querySelector("#budget input[type=range]");
            for (const budget of [0.9, 0.8, 0.7, 0.6, 0.5, 0.25]) {
                slider.value = budget;
                slider.dispatchEvent(new Event("input", { bubbles: true }));
                slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
                await new Promise(requestAnimationFrame);
            }
        }"""
    )
    visit.wait_for_cost_of(36)
    visit.page.wait_for_timeout(500)
    assert visit.cost()["Visual tokens"][0] == "36"
    # The first, and the last that came while it ran.
    assert sum("queue/join" in url for url in visit.requests) - before == 2


def test_what_the_slider_says_is_floor_of_budget_times_tokens(visit: Visit, served: str) -> None:
    config = visit.page.request.get(f"{served}config").json()
    (script,) = [event["js"] for event in config["dependencies"] if "visual tokens" in (event["js"] or "")]
    # Of 100 tokens, 0.29 are 29, where a product of floats says 28.
    for num_patches in (NUM_PATCHES, 100, 576):
        function = script.replace(str(NUM_PATCHES), str(num_patches))
        said = visit.page.evaluate(f"[...Array(101).keys()].map((percent) => ({function})(percent / 100))")
        tokens = [int(re.search(rf">(\d+) of {num_patches}", text)[1]) for text in said]
        assert tokens == [max(1, percent * num_patches // 100) for percent in range(101)]
    assert "from 0 to 1" in visit.page.evaluate(f"({script})(5)")


def test_on_a_phone_nothing_hangs_over_the_edge(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 360, "height": 740})
    visit.page.get_by_role("button", name=first_example()[1]).click()
    visit.wait_for_cost_of(57)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = "(e) => [...e.querySelectorAll('table, img, input, textarea, button')].map(e => e.getBoundingClientRect())"
    boxes = visit.page.locator("body").evaluate(wide)
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in boxes if box["width"])


# -- whatever is sent to it -------------------------------------------------------------------------------------------


@dataclass
class Visitor:
    """A program that uploads and asks as the page does, and that can send what the page never would."""

    address: str

    def upload(self, content: bytes, name: str = "image.png") -> dict[str, Any]:
        response = httpx.post(f"{self.address}gradio_api/upload", files={"files": (name, content)}, trust_env=False)
        return {"path": response.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}

    def ask(
        self, image: Any, question: Any = QUESTION, budget: Any = 0.4, reducer: Any = "adaptive"
    ) -> tuple[str, str]:
        """The answer, and the sentence that comes in its place."""
        config = httpx.get(f"{self.address}config", trust_env=False).json()
        (number,) = [one["id"] for one in config["dependencies"] if one["api_name"] == "answer"]
        session = {"session_hash": os.urandom(6).hex()}
        # As `json` writes it: NaN and lone surrogates too.
        body = json.dumps({"data": [image, question, budget, reducer, None], "fn_index": number} | session)
        headers = {"content-type": "application/json"}
        sent = {"content": body, "headers": headers, "trust_env": False, "timeout": 60}
        httpx.post(f"{self.address}gradio_api/queue/join", **sent).raise_for_status()
        place = f"{self.address}gradio_api/queue/data"
        with httpx.stream("GET", place, params=session, trust_env=False, timeout=60) as stream:
            said = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
            done = next(one for one in said if one["msg"] == "process_completed")
        if not done["success"]:
            return "", done["output"]["error"] or ""
        message, answer, *_ = done["output"]["data"]
        return answer, html.unescape(re.sub(r"</?p[^>]*>", "", message))


@pytest.fixture
def visitor(served: str) -> Visitor:
    """Whatever a visitor sent, the next one is answered at once."""
    visitor = Visitor(served)
    yield visitor
    start = time.perf_counter()
    assert visitor.ask(visitor.upload(SCENE.read_bytes())) == ("1", "")
    assert time.perf_counter() - start < PATIENCE / 1000


def encoded(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has next to no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


NO_IMAGE, TOO_LARGE, BROKEN = "is no image that can be read", "25 million at most", "cannot be decoded"
BAD_FILES = {
    "a text": (lambda: b"hello", NO_IMAGE),
    "nothing": (lambda: b"", NO_IMAGE),
    "an SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE),
    "a PSD": (lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 64, 64, 8, 3) + bytes(64), NO_IMAGE),
    # Other decoders run a program for it.
    "an EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop", NO_IMAGE),
    "half a PNG": (lambda: SCENE.read_bytes()[:1000], BROKEN),
    "12000 x 12000": (lambda: header_of_png(12_000, 12_000), "12000 x 12000 pixels; it may have " + TOO_LARGE),
    "60000 x 60000": (lambda: header_of_png(60_000, 60_000), TOO_LARGE),
    "5001 x 5000": (lambda: header_of_png(5_001, 5_000), TOO_LARGE),
    # Scaled by its shorter side this would have 144 million pixels.
    "1 x 20000": (lambda: encoded(Image.new("RGB", (1, 20_000))), "1 x 20000 pixels; one side"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_image_or_too_large_a_one_is_refused_in_a_sentence(name: str, visitor: Visitor) -> None:
    content, sentence = BAD_FILES[name]
    uploaded = visitor.upload(content())
    start = time.perf_counter()
    answer, said = visitor.ask(uploaded)
    assert answer == "" and sentence in said and said.endswith("."), said
    # Judged by its header: nothing was decoded, and nothing was asked.
    assert time.perf_counter() - start < 5
    assert uploaded["path"] not in said


def test_a_file_of_more_than_the_page_takes_is_refused_before_it_is_kept(served: str, visit: Visit) -> None:
    large = {"files": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(21_000_000))}
    refused = httpx.post(f"{served}gradio_api/upload", files=large, trust_env=False, timeout=60)
    assert refused.status_code == 413 and "maximum allowed size" in refused.text


GOOD_FILES = {
    "16 bits": lambda scene: encoded(
        Image.frombytes("I;16", scene.size, (np.asarray(scene.convert("L")).astype(np.uint16) * 257).tobytes())
    ),
    "grey": lambda scene: encoded(scene.convert("L")),
    "CMYK": lambda scene: encoded(scene.convert("CMYK"), "JPEG", quality=98),
    "a palette": lambda scene: encoded(scene.quantize(64), transparency=3),
    "an animation": lambda scene: encoded(
        scene.quantize(), "GIF", save_all=True, append_images=[Image.new("P", scene.size)] * 3
    ),
    "on its side": lambda scene: encoded(
        scene.transpose(Image.Transpose.ROTATE_90),
        "JPEG",
        quality=98,
        exif=b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0" + bytes(4),
    ),
    "EXIF data that are none": lambda scene: encoded(scene, "JPEG", quality=98, exif=b"Exif\0\0not a TIFF file"),
    "1 x 1": lambda scene: encoded(scene.crop((5, 5, 6, 6))),
    "a strip": lambda scene: encoded(scene.resize((100, 4_000))),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_an_image_of_any_kind_is_answered_as_the_model_answers_its_file(
    name: str, served: str, reference: tuple[Any, Any], tmp_path: Path
) -> None:
    model, _ = reference
    (tmp_path / "image").write_bytes(GOOD_FILES[name](Image.open(SCENE).convert("RGB")))
    visitor = Visitor(served)
    expected = model.generate(str(tmp_path / "image"), QUESTION, token_budget=0.4, do_sample=False)
    assert visitor.ask(visitor.upload((tmp_path / "image").read_bytes())) == (expected, "")


BAD_QUESTIONS = {
    "4000 words": ("what " * 4000, "20,000 characters; it may have 1,000"),
    "more tokens than the model reads": ("a " * 400, "this model reads at most 448"),
    "an image's place": ("What is <image> here?", "<image>, which stands for something else"),
    "the end of a text": ("red</s>", "</s>, which stands"),
    "a control character": ("red\0", "cannot be printed, U+0000"),
    "half a character": ("\ud800", "cannot be printed, U+D800"),
    "a number": (7, "has to be text"),
    "nothing": (None, "There is no question yet"),
}
BAD_CHOICES = {
    **{f"budget {budget!r}": ({"budget": budget}, "a number from 0 to 1") for budget in (5, -0.1, "0.4", None, True)},
    "budget NaN": ({"budget": float("nan")}, "a number from 0 to 1"),
    "budget of 400 digits": ({"budget": 10**400}, "a number from 0 to 1"),
    "no such reducer": ({"reducer": "nothing"}, "one of adaptive, "),
    "a list of reducers": ({"reducer": ["grid"]}, "one of adaptive, "),
    "a budget out of a reducer's reach": ({"reducer": "fastv", "budget": 0.05}, "'fastv' cannot go below"),
    **{name: ({"question": question}, sentence) for name, (question, sentence) in BAD_QUESTIONS.items()},
}
PASSWORDS = {"path": "/etc/passwd"}
BAD_PLACES = {
    "no image": (None, "There is no image yet."),
    "a file that was never uploaded": (PASSWORDS | {"meta": {"_type": "gradio.FileData"}}, "could not be answered"),
    "a file without Gradio's mark": (PASSWORDS, "Upload the image itself"),
    "an address": ({"path": "http://127.0.0.1:9/x", "meta": {"_type": "gradio.FileData"}}, "Upload the image itself"),
    "an address inside something": ([{"a": {"path": "https://127.0.0.1:9"}}], "Upload the image itself"),
    "a path": ("/etc/passwd", "could not be answered"),
}


def test_whatever_is_asked_in_another_form_is_refused_in_a_sentence(visitor: Visitor) -> None:
    scene = visitor.upload(SCENE.read_bytes())
    asked = {name: ({"image": scene} | changes, sentence) for name, (changes, sentence) in BAD_CHOICES.items()}
    asked |= {name: ({"image": image}, sentence) for name, (image, sentence) in BAD_PLACES.items()}
    for name, (changes, sentence) in asked.items():
        answer, said = visitor.ask(**changes)
        assert answer == "" and sentence in said and said.count("\n") == 0, (name, said)
        assert "/etc" not in said and "Traceback" not in said, (name, said)


def test_a_question_of_any_script_and_a_budget_between_the_slider_s_steps_are_taken(visitor: Visitor) -> None:
    scene = visitor.upload(SCENE.read_bytes())
    for question in ("\u202eאיזו ספרה אדומה?", "Which digit\nis red?\t", "<b>red</b> & blue", "👀" * 200):
        answer, said = visitor.ask(scene, question)
        assert answer and not said, question
    assert visitor.ask(scene, budget=0.123) == visitor.ask(scene, budget=17 / NUM_PATCHES)


def test_several_at_once_are_each_answered_and_nobody_passes_the_queue(visitor: Visitor, served: str) -> None:
    scene = visitor.upload(SCENE.read_bytes())
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda budget: visitor.ask(scene, budget=budget), [0.0, 0.4] * 3))
    assert answers == [("2", ""), ("1", "")] * 3
    direct = httpx.post(f"{served}gradio_api/run/answer", json={"data": [scene, QUESTION, 1, "grid"]}, trust_env=False)
    assert direct.status_code == 404


def test_the_page_says_why_a_file_is_not_answered(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(SCENE.read_bytes()[:1000])
    visit.page.set_input_files("#image input[type=file]", tmp_path / "half.png")
    visit.page.wait_for_selector("#image img", state="attached", timeout=PATIENCE)
    visit.ask(QUESTION)
    assert visit.sentence() == "The image is broken: it cannot be decoded. Upload an intact file."
    assert visit.page.locator("#cost table").count() == 0


# -- what it counts and draws -----------------------------------------------------------------------------------------


def module_of(folder: Path) -> ModuleType:
    """A Space's own file `looking.py`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("looking", folder / "looking.py")
    module = importlib.util.module_from_spec(spec)
    # Where its dataclass looks for its own module.
    sys.modules["looking"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def looking() -> ModuleType:
    return module_of(SPACE)


def torch_flops(text_config: Any, columns: int) -> int:
    """What torch counts while a stock language model reads a prompt and says what comes next."""
    model = AutoModelForCausalLM.from_config(text_config)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        model(torch.zeros(1, columns, dtype=torch.long), logits_to_keep=1, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_prefill_flops_are_what_torch_counts(looking: ModuleType, family: str) -> None:
    from tiny_models import tiny_text_config

    # No two widths alike, so that none is taken for another.
    config = tiny_text_config(family, hidden_size=40, intermediate_size=104, head_dim=12, num_layers=3)
    assert looking.prefill_flops(config, [23, 23, 23]) == torch_flops(config, 23)


def test_layers_count_the_tokens_that_they_see(looking: ModuleType) -> None:
    keep = torch.tensor([[True, False, True, True]])
    assert looking.layers_that_see(Selection.from_keep(keep), 6).tolist() == [[6, 0, 6, 6]]
    inside = Selection.from_keep(torch.ones(1, 4, dtype=torch.bool))
    inside.depth = torch.tensor([[6, 2, 2, 6]])
    assert looking.layers_that_see(inside, 6).tolist() == [[6, 2, 2, 6]]


@pytest.fixture(scope="module")
def checkpoint(looking: ModuleType) -> Any:
    return looking.Checkpoint(str(DIGITS))


def test_a_reducer_inside_the_decoder_costs_what_its_layers_see(checkpoint: Any, reference: tuple[Any, Any]) -> None:
    look = checkpoint.look(Image.open(SCENE), QUESTION, 0.4, "fastv")
    model, processor = reference
    inputs = processor.of_questions(Image.open(SCENE), QUESTION)
    depth = model.select_tokens(**inputs, token_budget=0.4, reducer="fastv").depth[0]
    num_text, num_layers = inputs["input_ids"].shape[1] - NUM_PATCHES, model.config.text_config.num_hidden_layers
    assert look.visual_tokens == pytest.approx(57, abs=1)
    assert look.visual_tokens == depth.sum().item() / num_layers
    # Each layer alone, as a language model of one layer whose head was counted elsewhere.
    one_layer = type(model.config.text_config).from_dict(model.config.text_config.to_dict() | {"num_hidden_layers": 1})
    head = 2 * one_layer.hidden_size * one_layer.vocab_size
    columns = [num_text + (depth > layer).sum().item() for layer in range(num_layers)]
    assert len(set(columns)) > 1
    assert look.prefill_flops == sum(torch_flops(one_layer, count) - head for count in columns) + head


def test_only_reducers_that_the_checkpoint_can_do_are_offered(checkpoint: Any) -> None:
    assert next(iter(checkpoint.reducers)) == "adaptive"
    assert {"resampler", "dynamicvit", "token_fusion", "random", "grid"} < set(checkpoint.reducers)
    for reducer in checkpoint.reducers.values():
        assert checkpoint.look(Image.open(SCENE), QUESTION, 0.5, reducer).visual_tokens == pytest.approx(72, abs=1)


@pytest.mark.parametrize("is_cut", [True, False])
def test_another_family_is_looked_at_as_it_answers_and_drawn_where_its_tiles_lie(
    is_cut: bool, looking: ModuleType, tmp_path: Path
) -> None:
    folder = family_folder("idefics3", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.do_image_splitting = is_cut
    processor.save_pretrained(folder)
    checkpoint, image = looking.Checkpoint(str(folder)), Image.new("RGB", (48, 48), "white")
    look = checkpoint.look(image, "Which digit is red?", 0.25, "grid")
    whole = checkpoint.look(image, "Which digit is red?", 1.0, looking.NEVER_ASKED)
    units = 5 if is_cut else 1
    assert (look.visual_tokens, whole.visual_tokens) == (4 * units, 16 * units)
    assert whole.prompt_tokens - look.prompt_tokens == 12 * units and look.prefill_flops < whole.prefill_flops
    model = AdaVTPForConditionalGeneration.from_pretrained(folder)
    said = model.generate(image, "Which digit is red?", token_budget=0.25, reducer="grid", max_new_tokens=64)
    assert look.answer == said
    # Four tiles of sixteen tokens, and beside them the view of the whole.
    side = 8 if is_cut else 4
    tiles, view = look.picture.crop((0, 0, 480, 480)), look.picture.crop((495, 0, 735, 240))
    for drawn, rows in ((tiles, side), (view, 4))[: 1 + is_cut]:
        brightness = np.asarray(drawn.convert("L").resize((rows, rows), Image.Resampling.BOX))
        assert sorted(brightness.flatten().tolist()) == [46] * (3 * rows**2 // 4) + [255] * (rows**2 // 4)


# -- the folder and the command ---------------------------------------------------------------------------------------


def head_of(readme: Path) -> dict[str, Any]:
    """The metadata at the head of a card."""
    return yaml.safe_load(readme.read_text(encoding="utf-8").split("---")[1])


def test_the_command_writes_a_space_for_the_checkpoint_and_says_how_it_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "space"
    done = CliRunner().invoke(app, ["space", "someone/my-llava", "--export", str(folder)])
    assert done.exit_code == 0, done.output
    assert "--repo-type space" in " ".join(done.output.split())
    head = head_of(folder / "README.md")
    assert (head["sdk"], head["models"], head["license"]) == ("gradio", ["someone/my-llava"], "apache-2.0")
    assert (folder / head["app_file"]).is_file()
    # The Hub refuses more.
    assert len(head["short_description"]) <= 60
    for image, question in json.loads((folder / "examples" / "questions.json").read_text()):
        assert Image.open(folder / "examples" / image).size == (192, 192)
        assert question.endswith("?")
    shipped = {
        path.relative_to(SPACE) for path in SPACE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == shipped
    looking = module_of(folder)
    monkeypatch.delenv("ADAVTP_CHECKPOINT", raising=False)
    assert looking.checkpoint_name() == "someone/my-llava"
    monkeypatch.setenv("ADAVTP_CHECKPOINT", "someone/another")
    assert looking.checkpoint_name() == "someone/another"


def test_a_space_needs_a_repository(tmp_path: Path) -> None:
    for repo_id in ("my-llava", "hub_cards/adavtp digits", "/home/someone/model", ""):
        with pytest.raises(ValueError, match="'owner/name'"):
            space_folder(tmp_path / "space", repo_id)
    for here in ([], [str(DIGITS)]):
        assert CliRunner().invoke(app, ["space", *here, "--export", str(tmp_path / "space")]).exit_code == 2
    assert not (tmp_path / "space").exists()


@NEEDS_GRADIO
def test_the_space_asks_for_the_gradio_that_it_was_tested_with() -> None:
    assert head_of(SPACE / "README.md")["sdk_version"] == version("gradio")


def test_the_space_needs_what_it_says_and_nothing_of_this_package() -> None:
    files = sorted(SPACE.glob("*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    installed = {"PIL" if requirement.name == "pillow" else requirement.name for requirement in required}
    assert {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) - {path.stem for path in files} == (
        installed | {"gradio"}
    )
    assert all(requirement.specifier.contains(version(requirement.name)) for requirement in required)


def test_a_space_is_brought_up_to_date_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder = space_folder(tmp_path / "space", "someone/first")
    space_folder(folder, "someone/second", examples=None)
    assert head_of(folder / "README.md")["models"] == ["someone/second"]
    assert not (folder / "examples").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        space_folder(other, "someone/first")
    assert (other / "README.md").read_text() == "mine"


def test_examples_of_ones_own_go_along(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    Image.new("RGB", (20, 10)).save(mine / "cat.png")
    (mine / "questions.json").write_text('[["cat.png", "Is there a cat?"]]')
    (mine / "secret.txt").write_text("not an example")
    folder = space_folder(tmp_path / "space", "someone/my-llava", examples=mine)
    assert sorted(path.name for path in (folder / "examples").iterdir()) == ["cat.png", "questions.json"]
    (mine / "questions.json").write_text('[["dog.png", "Is there a dog?"]]')
    with pytest.raises(ValueError, match="'dog.png'"):
        space_folder(tmp_path / "another", "someone/my-llava", examples=mine)
    assert not (tmp_path / "another").exists()


def test_examples_in_a_space_outlive_its_next_export(tmp_path: Path) -> None:
    folder = space_folder(tmp_path / "space", "someone/first")
    examples = folder / "examples"
    Image.new("RGB", (20, 10)).save(examples / "cat.png")
    (examples / "questions.json").write_text('[["cat.png", "Is there a cat?"]]')
    kept = {path.name: path.read_bytes() for path in examples.iterdir()}
    for more in (["--examples", str(examples)], []):
        done = CliRunner().invoke(app, ["space", "someone/second", "--export", str(folder), *more])
        assert done.exit_code == 0, done.output
        assert {path.name: path.read_bytes() for path in examples.iterdir()} == kept
    assert head_of(folder / "README.md")["models"] == ["someone/second"]


@pytest.mark.parametrize("pair", ['["../cat.png", "Is there a cat?"]', '["cat.png", 7]', '["sub/cat.png", "?"]'])
def test_an_example_that_the_page_could_not_show_is_refused(tmp_path: Path, pair: str) -> None:
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    for path in (tmp_path / "cat.png", mine / "cat.png", mine / "sub" / "cat.png"):
        Image.new("RGB", (20, 10)).save(path)
    (mine / "questions.json").write_text(f"[{pair}]")
    with pytest.raises(ValueError, match="`examples` is "):
        space_folder(tmp_path / "space", "someone/my-llava", examples=mine)
    assert not (tmp_path / "space").exists()


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["space"])
    assert done.exit_code == 2
    assert "pip install" in done.output
    assert "gradio" in done.output


@NEEDS_GRADIO
def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["space", "--port", str(port)])
    assert done.exit_code == 2
    assert str(port) in done.output
