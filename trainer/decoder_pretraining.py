"""A decoder that already reads: pretraining on pages that it is told, and a projector that tells them.

LLaVA starts from a pretrained language model. The reference model's small decoder has none to start from, and from
answers about images it stays at chance for a long time: it would have to learn at once to copy what a patch shows, to
find the patch that a question asks for, and what the tower's features mean. So it first learns the first two from
pages without pictures. There a visual token is the sum of the word embeddings of what the patch shows and belongs to.
Then tower and projector learn to make that sum of a picture, and projector and decoder learn further from pictures of
which few patches are shown, the answers' among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import nn

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .data.budget_stream import BudgetStream
from .data.chat_template import IGNORED
from .data.packed_collator import PackedQuestionCollator
from .looking_back import turn_of_role


def told_embeddings(word_embeddings: nn.Embedding, words: torch.Tensor) -> torch.Tensor:
    """
    The sums of word embeddings that tell what patches show.

    A word of another role than the patch's own has its embedding turned around by a quarter of the width for each: one
    linear map brings every word back, and until then none is taken for the patch's own. This is how vectors are bound
    to roles in holographic reduced representations (Plate, 1995).

    Args:
        words: `[..., num_labels]`, id + role * vocabulary size, -1 for none.

    Returns:
        `[..., width]`.
    """
    role, ids = words.clamp(min=0) // word_embeddings.num_embeddings, words % word_embeddings.num_embeddings
    width = word_embeddings.embedding_dim
    place = (torch.arange(width, device=words.device) - turn_of_role(role[..., None], width)) % width
    told = word_embeddings(ids.masked_fill(words < 0, 0)).gather(-1, place)
    return (told * (words >= 0)[..., None]).sum(dim=-2)


class ToldProjector(nn.Module):
    """
    Tower and projector of a model, which learn to tell what the tower sees in the decoder's words. What linear heads
    can read off the tower's features is more than a projector of the decoder's width brings into words by itself.

    Args:
        model: its tower and projector are trained, in place; word embeddings stay as they are.
    """

    def __init__(self, model: AdaVTPForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower.requires_grad_(True)
        self.projector = model.model.multi_modal_projector.requires_grad_(True)
        self.word_embeddings = model.get_input_embeddings().requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor, patch_words: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: `[batch, 3, height, width]`.
            patch_words: `[batch, num_patches, num_labels]`, what is told of each patch, see [`told_embeddings`].

        Returns:
            `loss`, the mean squared distance to the sums of word embeddings, as a share of their mean square.
        """
        features = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        told = told_embeddings(self.word_embeddings, patch_words)
        return {"loss": (self.projector(features) - told).square().mean() / told.square().mean()}


class ToldReader(nn.Module):
    """
    The decoder of a model, on prompts whose visual tokens are told in words.

    Args:
        model: its word embeddings, decoder and head are trained, in place.
    """

    def __init__(self, model: AdaVTPForConditionalGeneration) -> None:
        super().__init__()
        self.language_model, self.image_token_id = model.model.language_model, model.config.image_token_id
        # A stage that trained the projector has frozen the word embeddings.
        self.language_model.requires_grad_(True)
        # A head that shares its weight with the word embeddings is saved as these.
        is_tied = model.lm_head.weight is model.get_input_embeddings().weight
        self.lm_head = None if is_tied else model.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        patch_words: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids, position_ids, labels: `[batch, sequence]`, with a placeholder for each patch that is shown.
            attention_mask: `[batch, 1, sequence, sequence]` bool.
            patch_words: `[batch, num_shown, num_labels]`, what is told of each of them, see [`told_embeddings`].
        """
        patches = told_embeddings(self.language_model.get_input_embeddings(), patch_words)
        return self._answer(patches, input_ids, attention_mask, position_ids, labels)

    def _answer(
        self,
        patches: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        words = self.language_model.get_input_embeddings()
        is_patch = input_ids == self.image_token_id
        embeddings = words(input_ids.masked_fill(is_patch, 0)).masked_scatter(is_patch[..., None], patches)
        hidden_states = self.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        is_asked = labels[:, 1:] != IGNORED
        head = words if self.lm_head is None else self.lm_head
        logits = nn.functional.linear(hidden_states[:, :-1][is_asked], head.weight)
        targets = labels[:, 1:][is_asked]
        right = (logits.argmax(dim=-1) == targets).float().mean()
        return {"loss": nn.functional.cross_entropy(logits.float(), targets), "correct": right.detach()}


class ShownReader(ToldReader):
    """
    Projector and decoder of a model, on prompts with some of an image's patches. The tower sees all of them.

    Args:
        model: its projector, word embeddings, decoder and head are trained, in place; the tower stays as it is.
    """

    def __init__(self, model: AdaVTPForConditionalGeneration) -> None:
        super().__init__(model)
        self.vision_tower = model.model.vision_tower.requires_grad_(False)
        self.projector = model.model.multi_modal_projector.requires_grad_(True)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor,
        shown: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids, attention_mask, position_ids, labels: see [`ToldReader`].
            pixel_values: `[batch, 3, height, width]`.
            shown: `[batch, num_shown]`, which of its patches are shown, ascending.
        """
        with torch.no_grad():
            features = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        patches = self.projector(features.gather(1, shown[..., None].expand(-1, -1, features.shape[-1])))
        return self._answer(patches, input_ids, attention_mask, position_ids, labels)


@dataclass
class ToldPatches:
    """
    What patches show, in the decoder's words.

    Attributes:
        processor: whose tokenizer has them.
        patch_words, patch_roles: see [`DrawnTask`].
    """

    processor: AdaVTPProcessor
    patch_words: Mapping[str, tuple[str, ...]]
    patch_roles: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vocabulary = self.processor.tokenizer.get_vocab()
        self._ids = {
            name: torch.tensor(
                [*(vocabulary[word] + self.patch_roles.get(name, 0) * len(vocabulary) for word in words), -1]
            )
            for name, words in self.patch_words.items()
        }

    def of_rows(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """
        Words `[batch, num_patches, num_labels]`, see [`told_embeddings`]; of a patch of which nothing is told the
        unknown one.
        """
        words = torch.stack(
            [
                torch.stack([ids[torch.tensor(row[name], dtype=torch.long)] for row in rows])
                for name, ids in self._ids.items()
            ],
            dim=-1,
        )
        # A sum of nothing is no vector that a decoder's norm could read.
        words[..., 0].masked_fill_((words < 0).all(dim=-1), self.processor.tokenizer.unk_token_id)
        return words


@dataclass
class ToldImageCollator:
    """Batches rows of a drawn task for [`ToldProjector`]."""

    told: ToldPatches

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.told.processor.image_processor([row["image"] for row in rows], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"], "patch_words": self.told.of_rows(rows)}


@dataclass
class ToldPageCollator:
    """
    Batches rows of a drawn task that tells its patches in words, for [`ToldReader`], or `with_pictures` for
    [`ShownReader`].

    Few patches are shown, by `budgets` one number in each batch: those that the answers are read from, and others at
    random. For every second page the others begin with all of which more is told than a glyph: only among all that
    could be asked for does a decoder learn to tell them apart. Of the questions the first are asked whose answers
    these patches tell.
    """

    told: ToldPatches
    budgets: BudgetStream
    with_pictures: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        num_patches = len(rows[0][next(iter(self.told.patch_words))])
        # What is shown depends on the rows alone, so that a resumed run sees what it would have seen.
        number = crc32("".join(question for row in rows for question in row["questions"]).encode())
        num_shown = max(1, int(self.budgets.numbered([number]).item() * num_patches))
        asked = [_questions_within(row, num_shown) for row in rows]
        generator = torch.Generator().manual_seed(number)
        words = self.told.of_rows(asked)
        told = (words >= 0).sum(dim=-1)
        shown = torch.stack([_shown(*one, num_shown, generator) for one in zip(asked, told, strict=True)])
        batch = PackedQuestionCollator(self.told.processor)(asked)
        prompts = _at_columns(batch, shown, num_patches, self.told.processor.image_token_id)
        if self.with_pictures:
            return prompts | {"pixel_values": batch["pixel_values"], "shown": shown}
        return prompts | {"patch_words": words.gather(1, shown[..., None].expand(-1, -1, words.shape[-1]))}


def _questions_within(row: dict[str, Any], num_patches: int) -> dict[str, Any]:
    """A row with the first questions whose answers are read from no more than so many patches together."""
    needed, chosen = set(), []
    for number, patches in enumerate(row["answer_patches"]):
        if len(needed | set(patches)) <= num_patches:
            needed |= set(patches)
            chosen.append(number)
    of_questions = ("questions", "answers", "answer_patches")
    return row | {name: [row[name][number] for number in chosen] for name in of_questions}


def _shown(row: dict[str, Any], told: torch.Tensor, num_shown: int, generator: torch.Generator) -> torch.Tensor:
    """
    Patches that are shown, in their order: those of the answers, and others, `[num_shown]`; `told` `[num_patches]` is
    how many words are told of each.
    """
    order = torch.rand(len(told), generator=generator)
    if torch.rand((), generator=generator) < 0.5:
        order += told > 1
    order[[patch for patches in row["answer_patches"] for patch in patches]] += 2.0
    return order.topk(num_shown).indices.sort().values


def _at_columns(
    batch: dict[str, torch.Tensor], shown: torch.Tensor, num_patches: int, image_token_id: int
) -> dict[str, torch.Tensor]:
    """A packed batch without the placeholders of patches that are not shown; positions stay what they were."""
    is_patch = batch["input_ids"] == image_token_id
    first = is_patch.int().argmax(dim=1, keepdim=True)
    length = is_patch.shape[1] - num_patches + shown.shape[1]
    stays = ~is_patch
    stays.scatter_(1, first + shown, True)
    columns = stays.nonzero()[:, 1].view(-1, length)
    mask = batch["attention_mask"][:, 0]
    mask = mask.gather(1, columns[..., None].expand(-1, -1, mask.shape[-1]))
    mask = mask.gather(2, columns[:, None].expand(-1, length, -1))
    taken = {name: batch[name].gather(1, columns) for name in ("input_ids", "labels", "position_ids")}
    return taken | {"attention_mask": mask[:, None]}
