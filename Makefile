# make demo      see it work: real Label Studio, real workers, until Ctrl-C
# make test      everything: style, types, layers, unit, integration, end to end
# make install   leaves the command at .venv/bin/ls-anomaly

PYTHON ?= python3
LABEL_STUDIO_VERSION = 1.23.2
UV = .venv/bin/uv pip install --quiet

.PHONY: install demo test label-studio label-studio-ml browser clean
.DEFAULT_GOAL := install

install: .venv/.installed

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: pyproject.toml | .venv/bin/uv
	@echo "installing label-studio-anomaly into .venv (torch is large: one to three minutes at the first time)"
	$(UV) --python .venv --editable '.[backend,workers]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(UV) --python .venv --editable '.[backend,workers,dev]'
	@touch $@

label-studio: .venv-label-studio/.installed

.venv-label-studio/.installed: | .venv/bin/uv
	@echo "installing Label Studio $(LABEL_STUDIO_VERSION) into a venv of its own"
	$(PYTHON) -m venv .venv-label-studio
	$(UV) --python .venv-label-studio label-studio==$(LABEL_STUDIO_VERSION)
	@touch $@

# label-studio-ml 1.0.9 pins Flask 1.1, so it lives apart.
label-studio-ml: .venv-label-studio-ml/.installed

.venv-label-studio-ml/.installed: pyproject.toml | .venv/bin/uv
	.venv/bin/uv venv --quiet --allow-existing --python $(PYTHON) .venv-label-studio-ml
	$(UV) --python .venv-label-studio-ml --editable . 'label-studio-ml==1.0.9'
	@touch $@

# make demo [IMAGES=DIR] [CHECK=1]
demo: install label-studio
	.venv/bin/ls-anomaly demo --label-studio .venv-label-studio/bin/label-studio $(if $(IMAGES),--images "$(IMAGES)") $(if $(CHECK),--check)

# Debian's Chromium, if the machine has none and we may install it.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || echo "no Chromium: the browser tests will be skipped (install Debian's package chromium)"

test: .venv/.installed-dev label-studio label-studio-ml browser
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/pytest $(ARGS)

clean:
	rm -rf .venv .venv-* .demo artifacts .mypy_cache .ruff_cache .pytest_cache
