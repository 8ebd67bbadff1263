"""How LLaVA's own code writes a conversation, as chat templates.

Its checkpoints do not say which form they were trained with. The code chooses by the model's name; here the text
model's kind decides: Vicuna's form (`vicuna_v1` there) for Llama, `[INST]` (`mistral_instruct`) for Mistral. Images
stand before the words of their turn, each on a line of its own. Neither form writes a beginning of sequence, which the
tokenizer adds.
"""

_IMAGES_THEN_WORDS = """
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
""".strip()

VICUNA = (
    _IMAGES_THEN_WORDS
    + """
{%- if messages[0]['role'] != 'system' -%}
{{ 'A chat between a curious user and an artificial intelligence assistant. '
   "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ said(message['content']) + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + said(message['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + said(message['content']) + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
)

MISTRAL = (
    _IMAGES_THEN_WORDS
    + """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ said(message['content']) + '\\n' }}
{%- elif message['role'] == 'user' -%}{{ '[INST] ' + said(message['content']) + ' [/INST]' }}
{%- else -%}{{ ' ' + said(message['content']) + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)
