# make demo [VIDEO=clip.mp4]   names what the camera does in a video (without VIDEO, in a short clip that ships here)
# make test [ARGS="-k name"]   runs the tests in two processes; with ARGS, which goes to pytest, in one
# make hub-repo CARD=videomamba-tiny-camera-motion OUTPUT=folder [REPO=you/name]
#                              assembles a checkpoint's complete Hub repository, and pushes it to REPO
# make kernel-repo OUTPUT=folder [REPO=you/name]
#                              assembles the selective scan for other models, and pushes it to REPO on the Kernel Hub
# make dist                    writes the sdist and the wheel to dist/, and checks them
# make lint                    checks style, format, types and the pages' figures; needs no PyTorch
# make kernel-report           prints registers, spills and shared memory of the GPU kernels
# Each makes .venv on first use, with PYTHON=... if given, else the first Python >= 3.11 it finds.

.PHONY: demo dist hub-repo kernel-repo kernel-report lint test
.DELETE_ON_ERROR:
.NOTPARALLEL: # never two pips at once

export VIDEO CARD OUTPUT REPO
venv := .venv/bin/python
pythons := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)

demo: .venv/demo-installed
	@$(venv) examples/tools/classify_video.py $${VIDEO:+"$$VIDEO"}

hub-repo: .venv/demo-installed
	@$(venv) model_cards/make_hub_repo.py "$$CARD" "$$OUTPUT" $${REPO:+--push-to-hub "$$REPO"}

kernel-repo: .venv/demo-installed
	@$(venv) csrc/make_kernel_repo.py "$$OUTPUT" $${REPO:+--push-to-hub "$$REPO"}

test: .venv/test-installed
	$(venv) -m pytest $(or $(ARGS),-n 2 --dist loadfile)

dist: $(venv)
	$(venv) -m pip install --upgrade build twine
	rm -rf dist
	$(venv) -m build
	$(venv) -m twine check --strict dist/*

lint: .venv/lint-installed
	$(venv) -m ruff check .
	$(venv) -m ruff format --check .
	$(venv) -m mypy
	.venv/bin/clang-format --dry-run -Werror csrc/*.cu csrc/*.cuh
	$(venv) csrc/embed.py --check
	$(venv) docs/check_figures.py

kernel-report: .venv/demo-installed
	@$(venv) csrc/report.py $(ARGS)

$(venv):
	@for python in $(pythons); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making .venv with $$("$$python" --version)"; \
			"$$python" -m venv .venv && exit; \
			rm -rf .venv; \
			echo "$$python cannot make a virtual environment: see above" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "No Python 3.11 or later among: $(pythons). Name one with PYTHON=..." >&2; \
	exit 1

# A changed pyproject.toml installs again.
.venv/demo-installed: pyproject.toml | $(venv)
	$(venv) -m pip install --editable .
	@touch $@

.venv/test-installed: .venv/demo-installed
	$(venv) -m pip install --editable '.[test]'
	@touch $@

# Dependency groups need pip 25.1.
.venv/lint-installed: pyproject.toml | $(venv)
	$(venv) -m pip install --upgrade 'pip>=25.1'
	$(venv) -m pip install --group lint
	@touch $@
