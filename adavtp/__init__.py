"""AdaVTP: how much a vision-language model looks is a dial you turn at run time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration.configuration_adavtp import AdaVTPConfig
from .modeling.budget.budget_embedding import BudgetEmbedding
from .modeling.budget.selection import Selection
from .modeling.decoder.execution_plan import ExecutionPlan
from .modeling.generation_adavtp import BudgetProcessor, BudgetProcessorList, BudgetState
from .modeling.modeling_adavtp import AdaVTPForConditionalGeneration, AdaVTPModel
from .modeling.processing_adavtp import AdaVTPProcessor
from .modeling.reducers.adaptive import VisionTokenController
from .modeling.reducers.base import ScoringReducer, TokenReducer, register_reducer
from .modeling.vision.features import VisionFeatures

AutoConfig.register("adavtp", AdaVTPConfig, exist_ok=True)
AutoModel.register(AdaVTPConfig, AdaVTPForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(AdaVTPConfig, AdaVTPForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(AdaVTPConfig, AdaVTPForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AdaVTPConfig, AdaVTPProcessor, exist_ok=True)

if TYPE_CHECKING:
    from .trainer.data.collator import BudgetCollator
    from .trainer.trainer import AdaVTPTrainer
    from .trainer.training_arguments import AdaVTPTrainingArguments

# What only training needs is imported when it is asked for.
_OF_TRAINING = {
    "AdaVTPTrainer": "trainer.trainer",
    "AdaVTPTrainingArguments": "trainer.training_arguments",
    "BudgetCollator": "trainer.data.collator",
}


def __getattr__(name: str) -> Any:
    if name in _OF_TRAINING:
        return getattr(import_module(f".{_OF_TRAINING[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaVTPConfig",
    "AdaVTPForConditionalGeneration",
    "AdaVTPModel",
    "AdaVTPProcessor",
    "AdaVTPTrainer",
    "AdaVTPTrainingArguments",
    "BudgetCollator",
    "BudgetEmbedding",
    "BudgetProcessor",
    "BudgetProcessorList",
    "BudgetState",
    "ExecutionPlan",
    "ScoringReducer",
    "Selection",
    "TokenReducer",
    "VisionFeatures",
    "VisionTokenController",
    "register_reducer",
]
