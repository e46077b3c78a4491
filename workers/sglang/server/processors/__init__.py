"""Their processors, found by SGLang through ``SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE``."""
