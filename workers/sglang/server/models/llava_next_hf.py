"""LLaVA-NeXT and LLaVA-OneVision in the Hugging Face layout, served natively by SGLang.

A picture is seen in several views: whole, and in tiles as its shape suggests ("any resolution").
Which tiles belong to it, and where a row of it ends, is transformers' own code.
"""

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from workers.sglang.server.models.llava_hf import LlavaForConditionalGeneration


class _Anyres(LlavaForConditionalGeneration):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    def embed_picture(self, item):
        return self.pack(self.project(item.feature), torch.as_tensor(item.image_size))

    def pack(self, views, size):
        """``views`` [views, patches, hidden size] of a picture of ``size`` (height, width), in
        the order and the selection that the language model reads: [its tokens, hidden size]."""
        raise NotImplementedError


class LlavaNextForConditionalGeneration(_Anyres):
    def pack(self, views, size):
        packed, _ = LlavaNextModel.pack_image_features(
            self,  # it reads nothing but ``config``
            [views],
            [size],
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=self.image_newline,
        )
        return packed[0]


class LlavaOnevisionForConditionalGeneration(_Anyres):
    def pack(self, views, size):
        packed, _ = LlavaOnevisionModel.pack_image_features(
            self,
            [views],
            [size],
            image_newline=self.image_newline,
            vision_aspect_ratio=self.config.vision_aspect_ratio,
        )
        return packed[0]


EntryClass = [LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration]
