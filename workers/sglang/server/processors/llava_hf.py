"""Image preprocessing for ``models.llava_hf``: the checkpoint's own processor does it all."""

from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultimodalProcessor,
    MultimodalSpecialTokens,
)

from workers.sglang.server.models.llava_hf import LlavaForConditionalGeneration


class LlavaHfProcessor(BaseMultimodalProcessor):
    models = [LlavaForConditionalGeneration]  # noqa: RUF012 - SGLang reads a list

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
        items, input_ids, _ = await self.process_and_combine_mm_data_async(loaded, self.mm_tokens)
        return MultimodalProcessorOutput(
            input_ids=input_ids.tolist(), mm_items=items, im_token_id=self.image_token_id
        )
