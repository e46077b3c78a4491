"""Image preprocessing for Qwen-VL: SGLang's own, corrected."""

from sglang.srt.managers.mm_utils import tensor_hash
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from workers.sglang.server.processors.ids import PromptAsIds

FAMILIES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)


class QwenVLProcessor(QwenVLImageProcessor, PromptAsIds):
    models = [  # noqa: RUF012 - SGLang reads a list
        model for model in QwenVLImageProcessor.models if model.__name__ in FAMILIES
    ]

    def process_and_combine_mm_data(self, base_output, mm_tokens, processor=None, **kwargs):
        items, input_ids, found = super().process_and_combine_mm_data(
            base_output, mm_tokens, processor=processor, **kwargs
        )
        for item in items:
            grid = item.model_specific_data.get("image_grid_thw")
            # SGLang tells pictures apart by their patches. Those of a blank one are the same high
            # as wide, but not their positions, so what is cached of one was taken for the other.
            if item.is_image() and grid is not None and item.hash is None:
                item.hash = tensor_hash([item.feature, grid.to(item.feature)])
        self._check(base_output.input_ids, input_ids.tolist(), mm_tokens.image_token_id)
        return items, input_ids, found

    @staticmethod
    def _check(prompt, input_ids, placeholder):
        """SGLang only logs that it could not keep a prompt of ids, and goes on with another."""
        if prompt is not None:
            before, after = (
                [token_id for token_id in ids if token_id != placeholder]
                for ids in (prompt, input_ids)
            )
            if before != after:
                raise RuntimeError("SGLang has changed the tokens of a prompt with images.")
