"""Everything that can go wrong, as one tree.

AnomalyError
 ├─ ConfigError         settings, label config or command line: the user changes something (HTTP 400)
 ├─ LabelStudioError    Label Studio refused or did not answer (HTTP 502)
 │   └─ Unauthorized    the token was not accepted
 ├─ ImageError          one image cannot be fetched or decoded: that task is skipped, its batch goes on
 ├─ NotFitted           there is no fitted detector yet: an empty answer, never a crash
 ├─ StoreError          a file of the store is missing or damaged
 ├─ WeightsError        backbone weights are absent or not the ones asked for
 └─ JobError            a job cannot be run
     └─ Cancelled       somebody asked the job to stop

Every message says what to do about it.
"""


class AnomalyError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(AnomalyError):
    """A setting, a label config or an argument cannot work; the message names the change."""


class LabelStudioError(AnomalyError):
    """Label Studio refused a request or did not answer.

    Attributes:
        status: HTTP status of the answer, None if there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Unauthorized(LabelStudioError):
    """Label Studio did not accept the token."""


class ImageError(AnomalyError):
    """One image cannot be fetched or decoded."""


class NotFitted(AnomalyError):
    """A detector was asked to predict before it was fitted."""


class StoreError(AnomalyError):
    """A file of the store is missing or damaged."""


class WeightsError(AnomalyError):
    """Backbone weights are absent, or are not the ones asked for."""


class JobError(AnomalyError):
    """A job cannot be run."""


class Cancelled(JobError):
    """Somebody asked the running job to stop."""
