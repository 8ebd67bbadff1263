"""All reducers that come with AdaVTP, one method a file; importing this registers them."""

from .aim_adavtp import AimReducer
from .cdpruner_adavtp import CDPrunerReducer
from .cls_attention_adavtp import CLSAttentionReducer
from .controls_adavtp import GridReducer, RandomReducer
from .dart_adavtp import DARTLayerReducer, DARTReducer
from .depth_adavtp import DepthReducer
from .divprune_adavtp import DivPruneReducer
from .downsample_adavtp import DownsampleReducer
from .dynamicvit_adavtp import DynamicViTReducer
from .fastv_adavtp import FastVReducer
from .head_threshold_adavtp import HeadThresholdReducer
from .hired_adavtp import HiREDReducer
from .pool_adavtp import PoolReducer
from .prumerge_adavtp import PruMergePlusReducer, PruMergeReducer
from .pyramiddrop_adavtp import PyramidDropReducer
from .query_adavtp import QueryReducer
from .resampler_adavtp import ResamplerReducer
from .sparsevlm_adavtp import SparseVLMReducer
from .token_fusion_adavtp import TokenFusionReducer
from .tome_adavtp import ToMeReducer
from .visionzip_adavtp import VisionZipReducer
from .vispruner_adavtp import VisPrunerReducer
from .vtw_adavtp import VTWReducer

PUBLISHED_REDUCERS = (
    AimReducer,
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
    FastVReducer,
    HeadThresholdReducer,
    HiREDReducer,
    PoolReducer,
    PruMergePlusReducer,
    PruMergeReducer,
    PyramidDropReducer,
    QueryReducer,
    ResamplerReducer,
    SparseVLMReducer,
    TokenFusionReducer,
    ToMeReducer,
    VisPrunerReducer,
    VisionZipReducer,
    VTWReducer,
)
