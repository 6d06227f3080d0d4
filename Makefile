# make demo：在 CPU 上离线跑完整条 Qwen 链。
# make test：代码检查、类型检查，与不标 slow 的测试（两个核上几分钟）；make test-all：再加上标了 slow 的，一个不少。
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python
# Windows 的管道默认不是 UTF-8，测试读写的都是
export PYTHONUTF8 := 1
else
VENV_PYTHON := .venv/bin/python
endif
PYTEST := $(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo lint test test-slow test-all notebooks numbers-fill numbers-check clean
.NOTPARALLEL:

.venv/installed: requirements.txt pyproject.toml
	test -x $(VENV_PYTHON) || $(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(VENV_PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/installed
	cd qwen_chinese_finetune && ../$(VENV_PYTHON) run_all.py --preset tiny

lint: .venv/installed-dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

test: lint
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# make test test-all（.ci/run）里 test 只做一遍：没有一个测试跑两遍。
test-all: test test-slow

# 脚本改了，重做 notebooks/；记了新的数，重填 README 里的表。
notebooks: .venv/installed-dev
	$(VENV_PYTHON) notebooks/make_notebooks.py

numbers-fill: .venv/installed-dev
	$(VENV_PYTHON) docs/readme_numbers.py fill

numbers-check: .venv/installed-dev
	$(VENV_PYTHON) docs/readme_numbers.py check

clean:
	rm -rf .venv */outputs sentiment_classifier/my_bert_model* news_classifier/tnews_bert_model*
