# make demo：在 CPU 上离线跑完整条 Qwen 链；make test：代码检查与全部测试。
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python
else
VENV_PYTHON := .venv/bin/python
endif

.PHONY: demo test clean

.venv/installed: requirements.txt pyproject.toml
	test -x $(VENV_PYTHON) || $(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(VENV_PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/installed
	cd qwen_chinese_finetune && ../$(VENV_PYTHON) run_all.py --preset tiny

test: .venv/installed-dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf .venv */outputs sentiment_classifier/my_bert_model* news_classifier/tnews_bert_model*
