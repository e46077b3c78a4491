"""Pictures and prompts for ``models.llava_original``, by the code that the HF worker runs."""

import asyncio
import base64
import hashlib
import io
from pathlib import Path

from PIL import Image
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from workers.llava.images import Preparation
from workers.sglang.server.models.llava_original import (
    LlavaOriginalForConditionalGeneration,
    settings_of,
)
from workers.sglang.server.placeholders import expand


class LlavaOriginalProcessor(BaseMultimodalProcessor):
    models = [LlavaOriginalForConditionalGeneration]  # noqa: RUF012 - SGLang reads a list

    def __init__(self, hf_config, server_args, processor, *args, **kwargs):
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        original = hf_config.original
        self._image_token_id = hf_config.image_token_id
        self._prepare = Preparation(settings_of(original), hf_config, Path(original["tower"]))

    async def process_mm_data_async(self, image_data, input_text, request_obj, *args, **kwargs):
        if isinstance(input_text, str):
            raise ValueError("A LLaVA checkpoint in its original format takes input_ids.")
        return await asyncio.get_running_loop().run_in_executor(
            self.io_executor, self._process, image_data, input_text
        )

    def _process(self, image_data, ids):
        """``ids`` hold one placeholder for each of ``image_data``, images in base64."""
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in image_data
        ]
        prepared = [self._prepare([picture]) for picture in pictures]
        lengths = [tiles.lengths[0] for tiles in prepared]
        input_ids, offsets = expand(ids, self._image_token_id, lengths)
        return MultimodalProcessorOutput(
            input_ids=input_ids,
            mm_items=[
                _item(tiles.tensors["pixel_values"], (picture.height, picture.width), offset)
                for tiles, picture, offset in zip(prepared, pictures, offsets, strict=True)
            ],
            im_token_id=self._image_token_id,
        )


def _item(pixels, size, offset):
    """A picture of ``size`` (height, width): one square [1, 3, side, side], or its tiles
    [1, tiles, 3, side, side]."""
    pixels = pixels[0] if pixels.dim() == 5 else pixels
    # Tiles of one color are the same whatever the size, but the size says how many are read.
    digest = hashlib.sha256(pixels.numpy().tobytes() + repr(size).encode()).digest()
    return MultimodalDataItem(
        modality=Modality.IMAGE,
        feature=pixels,
        hash=int.from_bytes(digest[:8], "big"),
        offsets=[offset],
        model_specific_data={"image_size": size},
    )
