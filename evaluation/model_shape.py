"""The sizes that a model's cost depends on, read off its configuration.

Nothing here looks at weights: a configuration says how wide, how deep and how many, and that is all that counting
matrix products takes. The shape is hashable, so that what was counted for it once need not be counted again.
"""

from dataclasses import dataclass

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.reducers.base import feature_layer_index
from ..modeling.vision.budget_token import patch_width

# Sines and cosines of 128 frequencies: what the budget embedding's first layer reads (BudgetEmbedding).
BUDGET_ENCODING = 256


@dataclass(frozen=True)
class VisionShape:
    """
    A vision tower.

    Attributes:
        num_patches: N of one image.
        has_cls: whether a CLS token goes through the tower beside them.
        patch_pixels: numbers in one patch of the image, channels * size * size.
        hidden_size: width of the tower.
        num_heads: of its attention.
        mlp_size: inner width of its MLPs.
        mlp_matrices: 2, or 3 where the MLP is gated (DINOv2's SwiGLU).
        num_layers: layers that run, up to the feature layer.
        patch_width: of a patch feature, `hidden_size` times the number of feature layers.
    """

    num_patches: int
    has_cls: bool
    patch_pixels: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    mlp_matrices: int
    num_layers: int
    patch_width: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def of(cls, config: AdaVTPConfig) -> "VisionShape":
        """Reads it off the model's configuration."""
        vision = config.vision_config
        width, mlp_matrices = vision.hidden_size, 2
        if vision.model_type == "dinov2":
            mlp_size = int(width * vision.mlp_ratio)
            if vision.use_swiglu_ffn:
                # Two thirds of it, in multiples of 8, since there is a third matrix.
                mlp_size, mlp_matrices = (mlp_size * 2 // 3 + 7) // 8 * 8, 3
        else:
            mlp_size = vision.intermediate_size
        return cls(
            num_patches=config.num_patches,
            has_cls=config.has_cls,
            patch_pixels=vision.num_channels * vision.patch_size**2,
            hidden_size=width,
            num_heads=vision.num_attention_heads,
            mlp_size=mlp_size,
            mlp_matrices=mlp_matrices,
            num_layers=feature_layer_index(config),
            patch_width=patch_width(config),
        )


@dataclass(frozen=True)
class DecoderShape:
    """
    A Llama-shaped text model.

    Attributes:
        num_layers, hidden_size, mlp_size, vocab_size: L, d, m and V; the MLP is gated, with three matrices.
        num_heads, num_key_value_heads, head_dim: H heads of queries and fewer or as many of keys and values, each
            `head_dim` wide; H * `head_dim` need not be `hidden_size` (Qwen3).
        windows: for each layer how many columns its attention sees back, or `None` for all.
    """

    num_layers: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all keys of a token."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def of(cls, config: AdaVTPConfig) -> "DecoderShape":
        """Reads it off the model's configuration."""
        text = config.text_config
        window, types = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
        slides = [kind == "sliding_attention" for kind in types] if types else [True] * text.num_hidden_layers
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            mlp_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            windows=tuple(window if slide else None for slide in slides),
        )


@dataclass(frozen=True)
class ModelShape:
    """
    Tower, decoder, and the choices between them that change what is computed.

    Attributes:
        vision, decoder: the two models.
        keep_cls: whether CLS goes to the decoder with the patches.
        budget_fusion, budget_attention, question_aware, controller_head, controller_choice, min_token_entropy: see
            [`AdaVTPConfig`].
    """

    vision: VisionShape
    decoder: DecoderShape
    keep_cls: bool
    budget_fusion: str
    budget_attention: str
    question_aware: bool
    controller_head: str
    controller_choice: str
    min_token_entropy: float

    @classmethod
    def of(cls, config: AdaVTPConfig) -> "ModelShape":
        """Reads it off the model's configuration."""
        return cls(
            vision=VisionShape.of(config),
            decoder=DecoderShape.of(config),
            keep_cls=config.keep_cls,
            budget_fusion=config.budget_fusion,
            budget_attention=config.budget_attention,
            question_aware=config.question_aware,
            controller_head=config.controller_head,
            controller_choice=config.controller_choice,
            min_token_entropy=config.min_token_entropy,
        )
