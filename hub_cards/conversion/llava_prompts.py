"""How a LLaVA is asked: in its own chat template, or as LLaVA's own code writes a conversation.

A checkpoint's template may know text alone, as those of the language models do that LLaVA was made from; images then
go before the words of their turn, each on a line of its own, as everywhere in LLaVA. Where there is none, LLaVA's code
chooses one of its conversations by the model's name, and so does this file. None of these writes a beginning of
sequence in front, which the tokenizer does.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .llava_files import read_json

Templates = str | dict[str, str]

_SAID = """
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
""".strip()
# What a message has in parts becomes a string, for the template that follows.
_AS_TEXT = (
    _SAID
    + """
{%- set in_words = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is not none -%}
{%- set message = dict(message, content=said(message['content'])) -%}
{%- endif -%}
{%- set in_words.messages = in_words.messages + [message] -%}
{%- endfor -%}
{%- set messages = in_words.messages -%}
"""
)
_CONVERSATION = Template(
    _SAID
    + """
{%- set words = said(messages[0]['content']) if messages[0]['role'] == 'system' else $unless -%}
{%- set turn = namespace(begin=$system if words else '', is_first=true) -%}
{%- for message in (messages[1:] if messages[0]['role'] == 'system' else messages) -%}
{%- set words = said(message['content']) -%}
{%- if message['role'] == 'system' -%}{{ $system }}
{%- elif message['role'] == 'user' -%}{{ $user }}
{%- else -%}{{ $assistant }}
{%- endif -%}
{%- set turn.begin, turn.is_first = '', false -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ $asks }}{%- endif -%}
"""
)


def _conversation(user: str, assistant: str, asks: str = "''", system: str = "words", unless: str = "") -> str:
    """
    A chat template from Jinja expressions for what is written of a turn, in which `words` is what it says.

    Args:
        user, assistant, system: for a turn of each. What the system begins with goes before the first turn.
        asks: behind the last turn, for an answer.
        unless: the system's words where no message has some.
    """
    # `begin` is empty but in the first turn; LLaMA-2's has it inside.
    user = user if "turn.begin" in user else f"turn.begin ~ {user}"
    return _CONVERSATION.substitute(
        user=user, assistant=f"turn.begin ~ {assistant}", asks=asks, system=system, unless=json.dumps(unless)
    )


def _in_tags(head: str, end: str, unless: str = "") -> str:
    """A conversation in which every turn stands between `head`, with a role in it, and `end`."""
    user, assistant, system = (
        f"{json.dumps(head % role)} ~ words ~ {json.dumps(end)}" for role in ("user", "assistant", "system")
    )
    return _conversation(user, assistant, json.dumps(head % "assistant"), system, unless)


def _of_vicuna(person: str) -> str:
    return _conversation(
        *("'USER: ' ~ words ~ ' '", "'ASSISTANT: ' ~ words ~ eos_token", "'ASSISTANT:'", "words ~ ' '"),
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions.",
    )


_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_INST = "'[INST] ' ~ turn.begin ~ words ~ ' [/INST]'"
_ANSWER = "' ' ~ words ~ ' ' ~ eos_token"
_HEAD, _END = "<|im_start|>%s\n", "<|im_end|>"
# By the names that LLaVA's code has for them.
CONVERSATIONS = {
    "vicuna_v1": _of_vicuna("user"),
    "llava_v1": _of_vicuna("human"),
    "llava_llama_2": _conversation(
        f"('' if turn.is_first else bos_token) ~ {_INST}",
        *(_ANSWER, "''", r"'<<SYS>>\n' ~ words ~ '\n<</SYS>>\n\n'", _HELPFUL),
    ),
    # As LLaVA-NeXT trains it; when it asks, its code writes the user's header twice.
    "llava_llama_3": _in_tags("<|start_header_id|>%s<|end_header_id|>\n\n", "<|eot_id|>", _HELPFUL),
    "mistral_instruct": _conversation(_INST, _ANSWER, "''", r"words ~ '\n'"),
    "mpt": _in_tags(
        *(_HEAD, _END),
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    ),
    "chatml_direct": _in_tags(_HEAD, _END, "Answer the questions."),
    "mistral_zephyr": _in_tags("<|%s|>\n", "</s>", "You are a helpful AI assistant."),
    "qwen_1_5": _in_tags(_HEAD, f"{_END}\n", "You are a helpful assistant."),
    "plain": _conversation(r"words ~ '\n'", r"words ~ '\n'"),
}
_OTHER_NAMES = {
    "v1": "vicuna_v1",
    "llama_3": "llava_llama_3",
    "llava_mistral_instruct": "mistral_instruct",
    "mistral_direct": "chatml_direct",
    "v0_plain": "plain",
}
# What a model's name has in it -> the conversation that LLaVA's code takes for it, the first that fits.
_BY_NAME = (
    (r"llama[-_]?2", "llava_llama_2"),
    (r"llama[-_]?3", "llava_llama_3"),
    (r"mistral", "mistral_instruct"),
    (r"v1\.6-34b", "chatml_direct"),
    (r"qwen", "qwen_1_5"),
    (r"mpt", "mpt"),
    (r"v1", "vicuna_v1"),
)
_BY_KIND = {"llava_mistral": ("mistral_instruct", "LLaVA-1.6 on Mistral"), None: ("vicuna_v1", "LLaVA-1.5 on Vicuna")}


def llavas_conversation(fields: dict[str, Any], name: str) -> tuple[str, str]:
    """
    The chat template of a conversation of LLaVA's own code, and a sentence that says which it is and why.

    Args:
        fields: of the checkpoint's configuration.
        name: of the checkpoint.

    Raises:
        ValueError: if `version` among them names one that is not known here.
    """
    version = fields.get("version")
    by_name = next((it for pattern, it in _BY_NAME if re.search(pattern, name.lower())), None)
    if version is not None:
        chosen = _OTHER_NAMES.get(version, version) if isinstance(version, str) else None
        if chosen not in CONVERSATIONS:
            raise ValueError(
                f"`version` is {version!r} in the source's configuration; supported are "
                f"{', '.join(map(repr, (*CONVERSATIONS, *_OTHER_NAMES)))}. Give the chat template of another."
            )
        why = "`version` in its config.json says"
    elif by_name is not None:
        chosen, why = by_name, f"the name {name!r} says"
    else:
        chosen, what = _BY_KIND.get(fields.get("model_type"), _BY_KIND[None])
        return CONVERSATIONS[chosen], (
            f"The source has no chat template, and neither `version` nor its name says how it is asked; {chosen!r} of "
            f"LLaVA's code was written, that of {what}."
        )
    return CONVERSATIONS[chosen], f"The source has no chat template; {chosen!r} of LLaVA's code was written, as {why}."


def chat_template_of(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    otherwise: Callable[[], tuple[str | None, str]],
) -> tuple[Templates | None, str]:
    """
    The chat template, or several by name, of a checkpoint's processor or else of its tokenizer, able to place images,
    and a sentence on it; `otherwise` says both where it has none.

    Raises:
        ValueError: if there is one that cannot be used.
    """
    file, said = folder / "chat_template.json", read_json(folder / "chat_template.json").get("chat_template")
    if said is not None and not isinstance(said, str):
        raise ValueError(f"`chat_template` in {str(file)!r} is a {type(said).__name__}; expected is a text.")
    own = said or tokenizer.chat_template
    # transformers reads these from one of the folders that have been their place, and not beside a file of JSON.
    named = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*chat_templates/*.jinja"))}
    if named:
        own = named | (own if isinstance(own, dict) else {"default": own} if own else {})
    return _with_images(own, tokenizer, image_token) if own else otherwise()


def _with_images(templates: Templates, tokenizer: PreTrainedTokenizerBase, image_token: str) -> tuple[Templates, str]:
    """
    Chat templates that can place images, and a sentence that says whether they are as they were.

    Raises:
        ValueError: if the default cannot be rendered, or there is none.
    """
    if isinstance(templates, dict) and "default" not in templates:
        if len(templates) > 1:
            raise ValueError(
                f"The source has the chat templates {', '.join(map(repr, templates))}, and none is 'default'; "
                "give one."
            )
        templates = next(iter(templates.values()))
    others = ""
    if isinstance(templates, str):
        template = _one_with_images(templates, tokenizer, image_token)
        is_same = template == templates
    else:
        template, untried = {"default": _one_with_images(templates["default"], tokenizer, image_token)}, []
        for name in sorted(templates.keys() - {"default"}):
            try:
                template[name] = _one_with_images(templates[name], tokenizer, image_token)
            # One for tools or documents asks for more than a question.
            except ValueError:
                template[name] = templates[name]
                untried.append(name)
        is_same = template == templates
        if untried:
            named = ", ".join(map(repr, untried))
            others = f" {named} beside it cannot be asked a plain question, and was left as it is."
    added = "" if is_same else "; images go before the words of their turn"
    return template, f"The source's own chat template was kept{added}.{others}"


def _one_with_images(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    question = "what is it ?"
    shown = [{"type": "image"}, {"type": "text", "text": question}]
    said = _rendered(template, tokenizer, shown)
    if isinstance(said, str) and said.count(image_token) == 1 and question in said:
        return template
    in_words = _AS_TEXT.replace("<image>", image_token) + template
    said, expected = _rendered(in_words, tokenizer, shown), _rendered(template, tokenizer, question)
    if isinstance(expected, Exception) or question not in expected:
        raise ValueError(f"The source's chat template cannot be used ({expected}); give another.")
    if said != expected.replace(question, f"{image_token}\n{question}") or image_token in expected:
        raise ValueError(f"The source's chat template cannot place an image ({said}); give another.")
    return in_words


def _rendered(template: str, tokenizer: PreTrainedTokenizerBase, content: Any) -> str | Exception:
    messages = [{"role": "user", "content": content}]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    # Templates raise what their code does.
    except (TemplateError, TypeError, ValueError, OverflowError, AttributeError, KeyError, IndexError) as error:
        return error
