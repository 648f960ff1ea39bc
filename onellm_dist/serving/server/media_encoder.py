"""The thread that encodes the media of waiting requests, while the engine continues answers.

On a GPU both threads queue on one stream: a token waits for what was queued before it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from onellm_dist.common.logging import get_logger
from onellm_dist.model.generation.media_cache import MediaCache, encode_media
from onellm_dist.serving.server.jobs import Job, JobQueue

_log = get_logger(__name__)


class MediaEncoder:
    """Encodes the media of all requests that wait, up to some spans at once, as one pack.

    Their tokens are in the cache when the requests leave the queue. Where they are not, because
    encoding failed or newer ones took their place, the engine encodes them itself, and says what is
    wrong.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        queue: the requests; those with media are held until they are encoded.
        cache: keeps the tokens.
    """

    def __init__(self, model: Any, queue: JobQueue, cache: MediaCache) -> None:
        self._model = model
        self._queue = queue
        self._cache = cache
        self._thread = threading.Thread(target=self._work, name="media encoder", daemon=True)
        queue.holds_media = True

    def start(self) -> None:
        """Start the thread; it ends with the queue."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether media are encoded."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while jobs := self._queue.wait_for_media():
            try:
                self._encode(jobs)
                for job in jobs:
                    job.is_encoded = True
            except Exception:  # which of the requests is at fault, the engine finds out
                _log.warning("media could not be encoded ahead", exc_info=True)
            finally:
                self._queue.release(jobs)

    @torch.inference_mode()
    def _encode(self, jobs: Sequence[Job]) -> None:
        known = self._model.config.modalities
        media = [medium for job in jobs for medium in job.prompt.media]
        # Unknown modalities are the engine's to refuse.
        encode_media(self._model, [one for one in media if one.modality in known], self._cache)
