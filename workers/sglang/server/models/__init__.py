"""Model classes SGLang lacks, found by it through ``SGLANG_EXTERNAL_MODEL_PACKAGE``."""
