"""Image preprocessing for ``models.llava_hf``: the checkpoint's own processor does it all."""

from sglang.srt.managers.mm_utils import tensor_hash
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import MultimodalSpecialTokens
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from workers.prompts import pictures_for
from workers.sglang.server.models.llava_hf import LlavaForConditionalGeneration
from workers.sglang.server.models.llava_next_hf import (
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)
from workers.sglang.server.placeholders import expand, runs
from workers.sglang.server.processors.ids import PromptAsIds


class LlavaHfProcessor(PromptAsIds):
    """One item for each picture, so that each is cached for itself."""

    models = [  # noqa: RUF012 - SGLang reads a list
        LlavaForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration,
    ]

    def __init__(self, hf_config, server_args, processor, *args, **kwargs):
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        self.image_token_id = hf_config.image_token_id
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=processor.image_token, image_token_id=self.image_token_id
        ).build(processor)

    async def process_mm_data_async(self, image_data, input_text, request_obj, *args, **kwargs):
        loaded = await self.load_mm_data(
            prompt=input_text, image_data=image_data, multimodal_tokens=self.mm_tokens
        )
        if loaded.input_ids is None:  # a text, to SGLang's own routes
            bos = self._tokenizer.bos_token
            loaded.input_ids = self._tokenizer.encode(
                input_text, add_special_tokens=not (bos and input_text.startswith(bos))
            )
        items, input_ids, _ = await self.process_and_combine_mm_data_async(loaded, self.mm_tokens)
        return MultimodalProcessorOutput(
            input_ids=input_ids, mm_items=items, im_token_id=self.image_token_id
        )

    def process_and_combine_mm_data(self, base_output, mm_tokens, processor=None, **kwargs):
        """Runs in a thread, with a ``processor`` of its own."""
        # What is between the placeholders tells where one picture's tokens end.
        found = self.process_mm_data(
            "\n".join([mm_tokens.image_token] * len(base_output.images)),
            images=pictures_for(self._processor, base_output.images),
            processor=processor,
        )
        counts = runs(found["input_ids"].flatten().tolist(), self.image_token_id)
        input_ids, offsets = expand(base_output.input_ids, self.image_token_id, counts)
        sizes = found.get("image_sizes")
        items = [
            self._item(found["pixel_values"][i], None if sizes is None else sizes[i], offset)
            for i, offset in enumerate(offsets)
        ]
        return items, input_ids, found

    def _item(self, pixels, size, offset):
        pixels = pixels.cpu()
        if size is None:
            feature, facts = pixels[None], {}
        else:
            # Behind the picture's own views there may be padding, to the number of another's.
            views = image_size_to_num_patches(
                size, self.hf_config.image_grid_pinpoints, self.hf_config.vision_config.image_size
            )
            feature, facts = pixels[:views], {"image_size": size.cpu()}
        return MultimodalDataItem(
            modality=Modality.IMAGE,
            feature=feature,
            offsets=[offset],
            # Two blank pictures of different shapes may have the same pixels once they are tiled,
            # but not the same tokens.
            hash=tensor_hash([feature, *(fact.to(feature) for fact in facts.values())]),
            model_specific_data=facts,
        )
