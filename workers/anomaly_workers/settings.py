"""Configuration: one frozen object per process, from ANOMALY_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from anomaly_workers.errors import ConfigError

PREFIX = "ANOMALY_"


class Settings(BaseModel):
    """Everything that can be configured; secrets are masked in `repr` and logs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(
        Path.home() / ".local/share/label-studio-anomaly",
        description="Where versions, predictions, heatmaps and the embedded Redis live.",
    )
    redis_url: str = Field("", description="Redis to use, e.g. redis://host:6379/0. Empty: the embedded one.")
    host: str = Field("127.0.0.1", description="Address the front end listens on.")
    port: int = Field(9090, ge=1, le=65535, description="Port the front end listens on.")
    public_url: str = Field(
        "", description="The front end's address as a browser sees it. Empty: http://localhost:PORT."
    )
    backend_url: str = Field("", description="The front end's address as Label Studio sees it. Empty: the public URL.")
    user: str = Field("label-studio", description="Name for the basic authentication of Label Studio's requests.")
    password: SecretStr = Field(SecretStr(""), description="Its password. Empty: made once and kept in DATA_DIR.")
    label_studio_url: str = Field("", description="Label Studio, for projects that `connect` has not stored.")
    label_studio_token: SecretStr = Field(SecretStr(""), description="Its personal access token.")
    workers: int = Field(
        0, ge=0, le=64, description="Worker processes of `up` and `worker`. 0: one per GPU, or one on a CPU."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    detector: str = Field("patchcore-padim", description="Detection method.")
    backbone: str = Field("efficientnet_lite0", description="Frozen feature network: a timm or torchvision name.")
    weights: str = Field("", description="Local weight file for the backbone. Empty: the embedded package's.")
    weights_sha256: str = Field("", description="Checksum the weight file must have. Empty: not checked.")
    image_size: int = Field(256, ge=32, le=2048, description="Images are scaled to about this many pixels squared.")
    target_fpr: float = Field(0.01, gt=0, lt=0.5, description="Share of normal images that may raise an alarm.")
    batch_size: int = Field(16, ge=1, le=1024, description="Images per scoring job.")
    min_images: int = Field(10, ge=2, description="Images a project needs before the first fit starts at once.")
    max_fit_images: int = Field(400, ge=2, description="Most images one fit uses; more are sampled evenly.")
    max_megapixels: int = Field(100, ge=1, description="Larger images are refused.")
    max_image_bytes: int = Field(200_000_000, ge=1000, description="Larger downloads are refused.")
    learn_after: int = Field(5, ge=1, description="New verdicts after which a project learns from them.")
    learn_quiet_seconds: float = Field(60.0, ge=0, description="Quiet time after which it learns from fewer.")
    head_weight: float = Field(
        1.0, ge=0, le=3, description="How much confirmed defects change the scores. 0: not at all."
    )
    sweep_seconds: float = Field(20.0, gt=0, description="How often work that a webhook missed is looked for.")
    settle_seconds: float = Field(
        5.0, ge=0, description="Quiet time after the last new image before a small first fit."
    )
    job_timeout: int = Field(3600, ge=10, description="Seconds a job may run.")
    fetch_timeout: float = Field(30.0, gt=0, description="Seconds one image download may take.")
    allow_hosts: str = Field(
        "", description="Hosts images may come from besides Label Studio and public addresses, comma separated."
    )
    picture_cache_mb: int = Field(
        1000, ge=0, description="Decoded uploads kept on disk for each project, in megabytes. 0: none."
    )
    local_files_root: str = Field("", description="Folder behind /data/local-files/, if the worker sees it too.")
    uploads_root: str = Field("", description="Label Studio's media/upload folder, if the worker sees it too.")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Build the settings from `environ` (the process's own by default); `overrides` win.

    Raises:
        ConfigError: an unknown ANOMALY_* name, or a value that does not fit; the message names it.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for name, value in environ.items():
        if name.startswith(PREFIX):
            values[_field_of(name)] = value
    values = {name: value for name, value in values.items() if value != ""}
    try:
        return Settings(**(values | overrides))
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper()
        raise ConfigError(f"{name}: {first['msg']}. Given: {first['input']!r}.") from error


def public_url(settings: Settings) -> str:
    """Return the front end's address as a browser sees it, no trailing slash."""
    return (settings.public_url or f"http://localhost:{settings.port}").rstrip("/")


def backend_url(settings: Settings) -> str:
    """Return the front end's address as Label Studio sees it, no trailing slash."""
    return (settings.backend_url or public_url(settings)).rstrip("/")


def to_environ(settings: Settings) -> dict[str, str]:
    """Return the variables that give a child process the same settings."""
    given = settings.model_dump(exclude_defaults=True)
    plain = {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in given.items()}
    return {PREFIX + name.upper(): str(value) for name, value in plain.items()}


def _field_of(variable: str) -> str:
    name = variable.removeprefix(PREFIX).lower()
    if name not in Settings.model_fields:
        near = get_close_matches(name, Settings.model_fields, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{variable} is not a setting. Did you mean {PREFIX}{near.upper()}? The README lists them all."
        )
    return name
