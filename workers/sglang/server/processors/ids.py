"""Prompts that are token ids stay what they are."""

from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor


class PromptAsIds(BaseMultimodalProcessor):
    """Does not spell a prompt of ids, which SGLang would do to find the pictures' places in it.

    An answer to go on from may hold by chance what looks like a placeholder, and the text read
    anew could give other tokens.
    """

    async def load_mm_data(self, prompt, multimodal_tokens, image_data=None, **kwargs):
        if isinstance(prompt, str) or kwargs.get("video_data") or kwargs.get("audio_data"):
            return await super().load_mm_data(
                prompt=prompt, multimodal_tokens=multimodal_tokens, image_data=image_data, **kwargs
            )
        ids = list(prompt)
        places = ids.count(multimodal_tokens.image_token_id)
        if places != len(image_data):
            raise ValueError(f"Prompt has {places} image placeholders but {len(image_data)} images")
        loaded = await super().load_mm_data(
            prompt=multimodal_tokens.image_token * len(image_data),
            multimodal_tokens=multimodal_tokens,
            image_data=image_data,
            **kwargs,
        )
        loaded.input_ids = ids
        return loaded
