"""An accelerator whose memory is full, whoever says so."""


def out_of_memory(error: Exception) -> bool:
    """Whether an accelerator's memory is full, in the words of torch, cuDNN or cuBLAS."""
    said = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
