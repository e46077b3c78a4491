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
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model")
# The names of weights in checkpoints to ours, tried in order.
RENAMES = (
    # transformers 5; ours are those of transformers 4
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.(vision_tower|multi_modal_projector|image_newline)\b"), r"\1"),
    # except for this level, which releases of both have and have not
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
# No picture passes through these, so a checkpoint may have them or not.
UNUSED = re.compile(r"^vision_tower\.(post_layernorm|head)\.|\.position_ids$")
LORA_TARGETS = re.compile(
    r"^language_model\.model\.layers\.(\d+)\."
    r"(?:self_attn|mlp)\.(?:qkv_proj|o_proj|down_proj|gate_up_proj)"
)


class LlavaForConditionalGeneration(nn.Module):
    """Named as checkpoints name their architecture, so that they are used as they are."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        text = config.text_config
        _check_parts(config)
        # transformers reads this from the whole model's configuration, SGLang from the part's.
        text.tie_word_embeddings = config.tie_word_embeddings or text.tie_word_embeddings
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
        return torch.cat([self.embed_picture(item) for item in items])

    def embed_picture(self, item):
        """Embed one picture: [its tokens, hidden size]."""
        return self.project(item.feature).flatten(0, 1)

    def project(self, pixels):
        """What the language model sees of views [views, channels, height, width] of a picture:
        [views, patches, hidden size]."""
        weight = next(self.vision_tower.parameters())
        pixels = torch.as_tensor(pixels).to(device=weight.device, dtype=weight.dtype)
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        chosen = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
        return self.multi_modal_projector(chosen)

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
        own = {
            _renamed(name): parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("language_model.")
        }
        missing = {name for name in own if not UNUSED.search(name)}
        language = []
        for name, weight in weights:
            name = _renamed(name)
            if name.startswith("language_model."):
                language.append((name.removeprefix("language_model."), weight))
            elif name in own or not UNUSED.search(name):
                if (parameter := own.get(name)) is None:
                    raise ValueError(f"The checkpoint has a weight that the model lacks: {name}")
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
                missing.discard(name)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise ValueError(f"The checkpoint lacks {len(missing)} weights: {some}")
        self.language_model.load_weights(language)


def _renamed(name):
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _check_parts(config):
    """Raises ValueError: a part of the model is one that this class does not know."""
    parts = ((config.text_config, LANGUAGE_MODELS), (config.vision_config, VISION_TOWERS))
    for part, known in parts:
        if part.model_type not in known:
            raise ValueError(
                f"LLaVA with a {part.model_type} is not served by the SGLang worker (only "
                f"{', '.join(known)}); use the HF worker."
            )


EntryClass = [LlavaForConditionalGeneration]
