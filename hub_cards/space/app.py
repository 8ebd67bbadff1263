"""A page with an image, a question, and a slider for how much of the image the language model sees.

Moving the slider answers anew and shows what was kept. Which checkpoint answers is said in one place, `models` in the
head of README.md; the environment variable ADAVTP_CHECKPOINT (on the Hub a variable of the Space) names another.
"""

import json
from dataclasses import replace
from functools import partial
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency
from looking import FULL_BUDGET, NEVER_ASKED, Checkpoint, Look, checkpoint_name
from reading import FILE_SIZE, image_file, is_no_upload, read_budget, read_choice, read_image, read_question

FOLDER = Path(__file__).parent
FIRST_BUDGET = 0.4
STEP = 0.01
# Who comes when so many wait already is told so. Uploads and pictures are kept for an hour, in seconds.
MAX_WAITING, LOOKED_AFTER, KEPT_FOR = 32, 600, 3600

INTRODUCTION = """
# How much does the model look?

A vision-language model cuts an image into patches, and its language model reads one token for each. Here the budget
says how many of them it gets. Ask something, then move the slider.
"""

# No font comes from the net, and small print is as dark as people need it to be.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)

CSS = """
#image img, #picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
/* As high before there is a picture as with one, so that the slider stays where it is. */
#picture { aspect-ratio: 1; }
#message:not(:has(p)) { display: none; }
#message p { margin: 0; padding: 0.6rem 0.8rem; border-left: 4px solid #dc2626; }
#cost table { width: 100%; padding: 0; border: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
#cost th, #cost td { padding: 0.3rem; text-align: right; border: 0; }
#cost td { white-space: nowrap; }
#cost tr { border: 0; border-bottom: 1px solid #8888; }
#cost th:first-child { text-align: left; font-weight: 400; }
#cost caption { text-align: left; padding: 0 0.3rem 0.3rem; }
#cost p { margin: 0.5rem 0 0; }
#cost small { color: var(--body-text-color-subdued); }
"""

# Gradio's slider tells of its release by the mouse only. This lets go of it when a key is let go.
RELEASED_BY_KEY = """
() => document.addEventListener("keyup", (event) => {
    const moved = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End"];
    const is_range = event.target.matches("#budget input[type=range]") && moved.includes(event.key);
    const is_number = event.target.matches("#budget input[type=number]") && [...moved, "Enter"].includes(event.key);
    if (is_range || is_number) event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
})
"""


def examples() -> list[list[str]]:
    """Images and questions, from `examples/questions.json`; none where there is no such file."""
    file = FOLDER / "examples" / "questions.json"
    if not file.is_file():
        return []
    return [[str(file.with_name(image)), question] for image, question in json.loads(file.read_text("utf-8"))]


class Page(gr.Blocks):
    """Blocks in which whatever is sent is answered with what was asked for or with a sentence."""

    async def process_api(self, block_fn: Any, inputs: list[Any], *others: Any, **more: Any) -> dict[str, Any]:
        """See [`gradio.Blocks.process_api`]."""
        try:
            if is_no_upload(inputs):
                raise gr.Error(
                    "Upload the image itself; what it is called elsewhere will not do.", print_exception=False
                )
            return await super().process_api(block_fn, inputs, *others, **more)
        except gr.Error:
            raise
        # Its traceback goes to the log of the Space, and nothing of it to the visitor.
        except Exception as error:
            raise gr.Error(
                "This could not be answered: what was sent has another form than the page's, or there is a fault here."
            ) from error


def page(checkpoint: Checkpoint) -> gr.Blocks:
    """The page, for one checkpoint."""
    title = "AdaVTP: how much does the model look?"
    with Page(title=title, analytics_enabled=False, delete_cache=(LOOKED_AFTER, KEPT_FOR)) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=300):
                image, question, ask, message, example_loaded = _what_is_asked()
            with gr.Column(min_width=300):
                answer, picture = _what_comes_of_it()
                budget, reducer = _how_it_is_answered(checkpoint)
                cost = gr.HTML(elem_id="cost", padding=False)
        gr.Markdown(f"Checkpoint: `{checkpoint.shown_name}`")
        full = gr.State()
        # One run at a time for all visitors together, so that a time is of one answer alone; and of what one visitor
        # asks for while it runs, only the last.
        answering = {
            "fn": partial(answered, checkpoint),
            "inputs": [image, question, budget, reducer, full],
            "outputs": [message, answer, picture, cost, full],
            # What is sent is read in one place, in `answered`, and not by each component in its own way.
            "preprocess": False,
            "trigger_mode": "always_last",
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "minimal",
            "show_progress_on": answer,
        }
        gr.on([ask.click, question.submit, budget.release, reducer.input], **answering, api_name="answer")
        if example_loaded is not None:
            example_loaded.then(**answering, api_visibility="private")
        # What stands there is of another question now. In the browser alone, as it is for every key that is pressed.
        gr.on(
            [image.input, question.change], None, None, [message, answer, picture, cost], js="() => ['', '', null, '']"
        )
    # Nobody passes the queue: not even programs, which could otherwise ask past it.
    return blocks.queue(max_size=MAX_WAITING, api_open=False)


def _what_is_asked() -> tuple[gr.Image, gr.Textbox, gr.Button, gr.HTML, Dependency | None]:
    image = gr.Image(
        label="Image",
        sources=["upload", "clipboard"],
        height=300,
        alt_text="The image that is asked about.",
        elem_id="image",
    )
    question = gr.Textbox(label="Question", placeholder="What is in the picture?", max_lines=3, elem_id="question")
    ask = gr.Button("Ask", variant="primary")
    message = gr.HTML(elem_id="message", padding=False)
    if not (rows := examples()):
        return image, question, ask, message, None
    # With labels they are buttons, which a keyboard reaches.
    shown = gr.Examples(rows, [image, question], label="Examples", example_labels=[row[1] for row in rows])
    return image, question, ask, message, shown.load_input_event


def _how_it_is_answered(checkpoint: Checkpoint) -> tuple[gr.Slider, gr.Dropdown]:
    with gr.Group():
        budget = gr.Slider(
            *(0, 1, FIRST_BUDGET),
            step=STEP,
            label="Token budget",
            info="The share of the image's visual tokens that the language model gets.",
            buttons=[],
            elem_id="budget",
        )
        if checkpoint.num_patches is not None:
            kept = gr.HTML(_kept_text(checkpoint.num_patches), elem_id="kept")
            budget.change(inputs=budget, outputs=kept, js=_kept_text_in_browser(checkpoint.num_patches))
    names = list(checkpoint.reducers)
    return budget, gr.Dropdown(names, value=names[0], label="Chosen by", elem_id="reducer")


def _what_comes_of_it() -> tuple[gr.Textbox, gr.Image]:
    answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
    picture = gr.Image(
        label="What the language model saw",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="picture",
    )
    return answer, picture


def _kept_text(num_patches: int) -> str:
    """K = max(1, floor(b N)), worked out in hundredths: a product of floats may be off by one (0.29 of 100)."""
    num_keep = max(1, round(100 * FIRST_BUDGET) * num_patches // 100)
    return f'<span role="status">{num_keep} of {num_patches} visual tokens</span>'


def _kept_text_in_browser(num_patches: int) -> str:
    """The same for whatever the slider says, or that it may not say that, as a function in JavaScript."""
    # What is lost in a product of floats is far less than this.
    num_keep = f"Math.max(1, Math.floor(budget * {num_patches} + 1e-9))"
    is_allowed = "budget >= 0 && budget <= 1"
    kept, refusal = f"${{{num_keep}}} of {num_patches} visual tokens", "The budget is a number from 0 to 1."
    return f"""(budget) => `<span role="status">${{{is_allowed} ? `{kept}` : "{refusal}"}}</span>`"""


def answered(
    checkpoint: Checkpoint, image: Any, question: Any, budget: Any, reducer: Any, full: tuple[str, Look] | None
) -> tuple[Any, ...]:
    """
    What the page shows: message, answer, picture, cost; and `full`, kept for the next time: the image and question
    that were asked last, and the look at them at full budget. Of what is asked, nothing is taken for granted.
    """
    try:
        file, question = image_file(image), read_question(question)
        budget, reducer = read_budget(budget), read_choice(reducer, list(checkpoint.reducers))
        image = read_image(file)
        asked = sha256(file.read_bytes() + question.encode()).hexdigest()
        # A slow answer at full budget is asked for once; a quick one anew, so that both times are of the same moment.
        if full is None or full[0] != asked or full[1].num_timed > 1:
            whole = checkpoint.look(image, question, FULL_BUDGET, NEVER_ASKED)
            full = (asked, replace(whole, picture=None))
        look = checkpoint.look(image, question, budget, checkpoint.reducers[reducer])
    except ValueError as error:
        return f'<p role="alert">{escape(str(error))}</p>', "", None, "", full
    seen = f"{look.visual_tokens:g} of {full[1].visual_tokens:g} visual tokens"
    picture = gr.Image(look.picture, alt_text=f"The image as the language model saw it: all but {seen} are dark.")
    return (
        "",
        look.answer,
        picture,
        cost_table(question, f"Budget {budget:g}, chosen by {reducer}.", look, full[1], checkpoint),
        full,
    )


def cost_table(question: str, how: str, look: Look, full: Look, checkpoint: Checkpoint) -> str:
    """What an answer cost beside what it costs at full budget, under what was asked, and how, as HTML."""
    rows = [
        ("Visual tokens", look.visual_tokens, full.visual_tokens, "{:g}".format),
        ("Prompt, tokens", look.prompt_tokens, full.prompt_tokens, "{:g}".format),
        ("Prefill, FLOPs", look.prefill_flops, full.prefill_flops, _with_prefix),
        ("Time, ms", look.milliseconds, full.milliseconds, "{:.1f}".format),
        ("Answer, tokens", look.new_tokens, full.new_tokens, str),
    ]
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{write(here)}</td><td>{write(there)}</td>'
        f"<td>{100 * here / there:.0f}%</td></tr>"
        for name, here, there, write in rows
        # Not every language model's prefill is counted here.
        if here is not None
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Cost", "this budget", "full budget", "share"))
    return (
        # A question written from right to left turns nothing but itself.
        f"<table><caption><bdi>{escape(question)}</bdi> {escape(how)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>At full budget the answer is: {escape(full.answer) or '(nothing)'}</p>"
        "<p><small>Prefill is the language model on the prompt, counted from its shape, 1 multiply-add as 2 FLOPs, "
        "without vision tower and reducer. Time is of a whole answer, both included: the median of "
        f"{_readings(look)} on this {escape(checkpoint.device)}, of {_readings(full)} at full budget.</small></p>"
    )


def _readings(look: Look) -> str:
    return f"{look.num_timed} reading{'s' * (look.num_timed > 1)}"


def _with_prefix(number: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    thousands = 0
    while number >= 999.5 and thousands < 5:
        number, thousands = number / 1000, thousands + 1
    return f"{number:.3g} {' kMGTP'[thousands]}".strip()


if __name__ == "__main__":
    page(Checkpoint(checkpoint_name())).launch(
        theme=THEME,
        css=CSS,
        js=RELEASED_BY_KEY,
        max_file_size=FILE_SIZE,
        ssr_mode=False,
        run_history=False,
        footer_links=["gradio"],
    )
