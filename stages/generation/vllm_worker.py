"""Runs inside vLLM's worker process: what `reload_weights` leaves undone for tied weights.

vLLM processes a reloaded tensor for one of the layers that share it (`vllm/model_executor/model_loader/reload`
says so). With tied word embeddings that is the input embedding; the output head keeps the weights it was packed
from, so a published version would sample with new layers and an old head.
"""

from typing import Any


class WeightsExtension:
    """Mixed into vLLM's worker by --worker-extension-cls; its methods can be called by `/collective_rpc`."""

    model_runner: Any

    def refresh_tied_heads(self) -> None:
        """Tie every output head to the reloaded embedding again and pack it anew."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        model = self.model_runner.get_model()
        if not getattr(model.config, "tie_word_embeddings", False):
            return
        layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        embedding = next(layer for layer in layers if not isinstance(layer, ParallelLMHead))
        for head in layers:
            if isinstance(head, ParallelLMHead):
                head.weight = embedding.weight
                head.quant_method.process_weights_after_loading(head)
