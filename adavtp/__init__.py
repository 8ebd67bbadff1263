"""AdaVTP: how much a vision-language model looks is a dial you turn at run time."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration.configuration_adavtp import AdaVTPConfig
from .modeling.budget_adavtp import BudgetEmbedding
from .modeling.controller_adavtp import VisionTokenController
from .modeling.generation_adavtp import BudgetProcessor, BudgetProcessorList, BudgetState
from .modeling.modeling_adavtp import AdaVTPForConditionalGeneration, AdaVTPModel
from .modeling.processing_adavtp import AdaVTPProcessor
from .modeling.reducers_adavtp import TokenReducer, register_reducer
from .modeling.selection_adavtp import Selection

AutoConfig.register("adavtp", AdaVTPConfig, exist_ok=True)
AutoModel.register(AdaVTPConfig, AdaVTPForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(AdaVTPConfig, AdaVTPForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AdaVTPConfig, AdaVTPProcessor, exist_ok=True)

__all__ = [
    "AdaVTPConfig",
    "AdaVTPForConditionalGeneration",
    "AdaVTPModel",
    "AdaVTPProcessor",
    "BudgetEmbedding",
    "BudgetProcessor",
    "BudgetProcessorList",
    "BudgetState",
    "Selection",
    "TokenReducer",
    "VisionTokenController",
    "register_reducer",
]
