"""Image preprocessing for Qwen-VL: SGLang's own, corrected."""

from sglang.srt.managers.mm_utils import tensor_hash
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from workers.sglang.server.hooks import ChangedError
from workers.sglang.server.placeholders import expand
from workers.sglang.server.positions import of_pictures
from workers.sglang.server.processors.ids import PromptAsIds

FAMILIES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)

REPLACED = ("_compute_image_only_mrope_positions_from_offsets", "build_input_ids")
for _name in REPLACED:
    if not hasattr(QwenVLImageProcessor, _name):
        raise ChangedError(f"QwenVLImageProcessor.{_name}")


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

    def build_input_ids(self, prompt, img_grid_thw=None, video_grid_thw=None, **kwargs):
        """Have a client's ``<|video_pad|>`` be text: there is no video."""
        if isinstance(prompt, str) or img_grid_thw is None or video_grid_thw is not None:
            return super().build_input_ids(prompt, img_grid_thw, video_grid_thw, **kwargs)
        counts = (img_grid_thw.prod(-1) // self.spatial_merge_size**2).tolist()
        input_ids, offsets = expand(prompt, self.IM_TOKEN_ID, counts)
        return input_ids, offsets, [Modality.IMAGE] * len(counts)

    def _compute_image_only_mrope_positions_from_offsets(self, input_len, mm_items, dtype, device):
        """Positions [3, 1, tokens], and how far the next one is from the number of tokens [1, 1].

        For all families: SGLang has it for newer ones only, and looks for the pictures of the
        others behind each ``<|vision_start|>``, which a client may have left out or written.
        """
        if not mm_items or not all(item.is_image() for item in mm_items):
            return None
        merge = self.spatial_merge_size
        pictures = []
        for item in mm_items:
            grids = item.model_specific_data["image_grid_thw"].reshape(-1, 3).tolist()
            if len(grids) != len(item.offsets):  # SGLang takes neighbours for one
                raise ValueError("Qwen-VL needs text between two images.")
            for (start, _), (_, rows, columns) in zip(item.offsets, grids, strict=True):
                pictures.append((start, rows // merge, columns // merge))
        positions = of_pictures(input_len, sorted(pictures)).to(dtype=dtype, device=device)
        return positions[:, None], (positions.max() + 1 - input_len).reshape(1, 1)

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
