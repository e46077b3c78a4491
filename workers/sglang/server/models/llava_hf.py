"""LLaVA checkpoints in the Hugging Face layout (``llava-hf/...``), served natively by SGLang.

SGLang has a class of this name for the original LLaVA layout only, and runs the HF layout through
transformers, without its prefix cache. Here the vision tower and the projector are those of
transformers and the language model is SGLang's. ``pad_input_ids`` writes each image's hash into
the token ids, which is what lets the prefix cache tell two images apart.
"""

import importlib
import re
from collections.abc import Iterable

import torch
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import AutoModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

# Named here so that only one of SGLang's 270 model modules is imported.
LANGUAGE_MODELS = {
    "llama": ("sglang.srt.models.llama", "LlamaForCausalLM"),
    "mistral": ("sglang.srt.models.mistral", "MistralForCausalLM"),
    "qwen2": ("sglang.srt.models.qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("sglang.srt.models.qwen3", "Qwen3ForCausalLM"),
}
# The names of transformers 5 to ours, which are those of transformers 4.
RENAMES = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.(vision_tower|multi_modal_projector)\."), r"\1."),
)
LORA_TARGETS = re.compile(
    r"^language_model\.model\.layers\.(\d+)\."
    r"(?:self_attn|mlp)\.(?:qkv_proj|o_proj|down_proj|gate_up_proj)"
)


class LlavaForConditionalGeneration(nn.Module):
    """Named as checkpoints name their architecture, so that they are used as they are."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        text = config.text_config
        if text.model_type not in LANGUAGE_MODELS:
            raise ValueError(
                f"LLaVA with a {text.model_type} language model is not served by the SGLang "
                f"worker (only {', '.join(LANGUAGE_MODELS)}); use the HF worker."
            )
        module, name = LANGUAGE_MODELS[text.model_type]
        self.config = config
        self.language_model = getattr(importlib.import_module(module), name)(
            text, quant_config=quant_config, prefix=add_prefix("language_model", prefix)
        )
        # SGLang makes the precision that was asked for torch's default; transformers would take
        # the one that the vision tower was saved in.
        self.vision_tower = AutoModel.from_config(
            config.vision_config, dtype=torch.get_default_dtype()
        )
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self._padding = MultiModalityDataPaddingPatternMultimodalTokens()

    def should_apply_lora(self, module_name):
        return bool(LORA_TARGETS.match(module_name))

    def pad_input_ids(self, input_ids, mm_inputs):
        return self._padding.pad_input_tokens(input_ids, mm_inputs)

    def get_input_embeddings(self):
        return self.language_model.model.embed_tokens

    def get_image_feature(self, items):
        """Embed the pictures: [image tokens, hidden size], in order."""
        weight = self.multi_modal_projector.linear_1.weight
        features = []
        for item in items:
            pixels = torch.as_tensor(item.feature).to(device=weight.device, dtype=weight.dtype)
            if pixels.dim() == 3:
                pixels = pixels[None]
            states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
            layers = self.config.vision_feature_layer
            layers = [layers] if isinstance(layers, int) else layers
            first = 1 if self.config.vision_feature_select_strategy == "default" else 0
            chosen = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
            features.append(self.multi_modal_projector(chosen).flatten(0, 1))
        return torch.cat(features)

    @torch.no_grad()
    def forward(self, input_ids, positions, forward_batch, get_embedding=False, **_kwargs):
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: self.get_image_feature},
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]):
        own = dict(self.named_parameters())
        language = []
        for name, weight in weights:
            for pattern, replacement in RENAMES:
                name = pattern.sub(replacement, name)
            if name.startswith("language_model."):
                language.append((name.removeprefix("language_model."), weight))
                continue
            if name not in own:  # transformers 5 dropped this level
                name = name.replace("vision_tower.vision_model.", "vision_tower.")
            if name not in own and "position_ids" in name:
                continue
            parameter = own[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
        self.language_model.load_weights(language)


EntryClass = [LlavaForConditionalGeneration]
