"""All reducers that come with AdaVTP, one method a file; importing this registers them."""

from .aim import AimReducer
from .apet import ApETLayerReducer, ApETReducer
from .autoprune import AutoPruneReducer
from .cdpruner import CDPrunerReducer
from .cls_attention import CLSAttentionReducer
from .controls import GridReducer, RandomReducer
from .dart import DARTLayerReducer, DARTReducer
from .depth import DepthReducer
from .divprune import DivPruneReducer
from .downsample import DownsampleReducer
from .dynamicvit import DynamicViTReducer
from .evs import EVSReducer
from .fastv import FastVReducer
from .head_threshold import HeadThresholdReducer
from .hiprune import HiPruneReducer
from .hired import HiREDReducer
from .native import NativeReducer
from .pool import PoolReducer
from .priortr import PriorTRReducer
from .progressive import ProgressiveReducer
from .prumerge import PruMergePlusReducer, PruMergeReducer
from .pyramiddrop import PyramidDropReducer
from .query import QueryReducer
from .random_layer import RandomLayerReducer
from .resampler import ResamplerReducer
from .scope import SCOPEReducer
from .sparsevlm import SparseVLMReducer
from .token_fusion import TokenFusionReducer
from .tome import ToMeReducer
from .vidcom2 import VidCom2Reducer
from .visionzip import VisionZipReducer
from .vispruner import VisPrunerReducer
from .vtw import VTWReducer

PUBLISHED_REDUCERS = (
    AimReducer,
    ApETLayerReducer,
    ApETReducer,
    AutoPruneReducer,
    CDPrunerReducer,
    CLSAttentionReducer,
    GridReducer,
    RandomReducer,
    DARTLayerReducer,
    DARTReducer,
    DepthReducer,
    DivPruneReducer,
    DownsampleReducer,
    DynamicViTReducer,
    EVSReducer,
    FastVReducer,
    HeadThresholdReducer,
    HiPruneReducer,
    HiREDReducer,
    NativeReducer,
    PoolReducer,
    PriorTRReducer,
    ProgressiveReducer,
    PruMergePlusReducer,
    PruMergeReducer,
    PyramidDropReducer,
    QueryReducer,
    RandomLayerReducer,
    ResamplerReducer,
    SCOPEReducer,
    SparseVLMReducer,
    TokenFusionReducer,
    ToMeReducer,
    VidCom2Reducer,
    VisPrunerReducer,
    VisionZipReducer,
    VTWReducer,
)
