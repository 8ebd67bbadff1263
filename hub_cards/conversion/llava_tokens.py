"""The two tokens that LLaVA's own checkpoints lack: one that holds an image's place, and one for padding.

LLaVA's own code cuts a prompt at its images and needs no token for them. transformers fills the places of `<image>`
tokens instead. The token gets a row in the input embeddings that no forward pass reads, since an image's features
stand there, and a row in the head like any other token's.
"""

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROWS_ARE_A_MULTIPLE_OF = 64
VARIANCE_OF_NEW_ROWS = 1e-5
_ROWS_AT_ONCE = 4096


def add_image_and_pad_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    Gives a tokenizer `<image>`, and `<pad>` for padding, as the published llava-hf checkpoints have them. Returns the
    tokens that were not there before.
    """
    known = set(tokenizer.get_vocab())
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    return [token for token in (IMAGE_TOKEN, PAD_TOKEN) if token not in known]


def rows_for(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> int:
    """
    How many rows the embeddings need for a tokenizer: as many as they have where its ids fit, else the next multiple
    of 64, which is what the published llava-hf checkpoints have (32,064 for 32,002 tokens).
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    return num_rows if needed <= num_rows else -(-needed // ROWS_ARE_A_MULTIPLE_OF) * ROWS_ARE_A_MULTIPLE_OF


def new_rows(embeddings: torch.Tensor, num_new: int, generator: torch.Generator) -> torch.Tensor:
    """
    Rows for new tokens, distributed as those that are there: N(mean, 1e-5 covariance) over the embeddings' rows.

    That is the rule of transformers' own conversion (`convert_llava_weights_to_hf.py`), by which the published
    llava-hf checkpoints got theirs, for the head as well as for the embeddings. With z ~ N(0, 1) for every row e_i,
    mean + sqrt(1e-5 / n) sum_i z_i (e_i - mean) has this distribution, so that no covariance has to be factored.

    Args:
        embeddings: `[num_rows, hidden_size]`.
        num_new: how many rows.
        generator: of the random numbers.

    Returns:
        `[num_new, hidden_size]`, in the dtype of `embeddings`.
    """
    num_rows = len(embeddings)
    weights = torch.randn(num_new, num_rows, generator=generator)
    total, mixed = torch.zeros(embeddings.shape[1]), torch.zeros(num_new, embeddings.shape[1])
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = embeddings[start : start + _ROWS_AT_ONCE].float()
        total += rows.sum(dim=0)
        mixed += weights[:, start : start + _ROWS_AT_ONCE] @ rows
    mean = total / num_rows
    deviation = mixed - weights.sum(dim=1, keepdim=True) * mean
    return (mean + (VARIANCE_OF_NEW_ROWS / num_rows) ** 0.5 * deviation).to(embeddings.dtype)
