"""检索增强生成（RAG）各脚本共用的几块，一块一个文件，都是平常的函数与小类。从下往上：

tokenizers.py   文字 → 词。characters_and_bigrams（中文的默认）、characters、bigrams、jieba_words，
                以及中文里不管用的两种默认 whitespace、word_pattern；tokenizer_named(名字)
bm25.py         BM25(tokenizer).add(ids, texts) / .delete(ids) / .search(问题, k, allowed=None) → [(id, 分)]
                add 给已有的 id 就是改；.scores(问题) → (D,)；.save(文件夹)、BM25.load(文件夹)；top(分, k) → 位置
chunking.py     Chunk(id, text, document, start, end, meta)：知识库里的一条
                fixed / recursive / sentences / structure(text, size, overlap) → [(start, end)]，text[start:end] 是一块；
                make_chunks(文档名, text, spans, **meta) → [Chunk]，id 由文字的散列定，文字没变 id 就没变
embed.py        load_embedder("auto" | "e5" | "hashed" | hub 名或文件夹, threads=1) → embedder
                embedder.passages(文字们)、embedder.queries(问题们) → (N, D) 长度为 1 的 float32；
                .name .dim .fingerprint .tokens_seen；fit_lsa(文字们) → 在自己的文档上学的 embedder
store.py        open_store(网址, embedder.fingerprint, embedder.dim) → Store：
                .upsert(chunks, vectors) .delete(ids) .search(vectors, k, where=None) → 每问一列 Hit
                .get(ids) → [Chunk]  .ids(where) .count(where) .close()
                Hit(id, score, text, document, meta)；where = {"tenant": "甲", "page": [1, 2], "document": "…"}
                faiss://文件夹（默认；?index=numpy 不用 faiss）、qdrant://、milvus://、pgvector://、elasticsearch://、opensearch://；
                返回了就落了盘；别的 embedder 建的库拒绝打开；SqliteStore 另有 .vectors(ids)
fill.py         fill(store, embedder, chunks, where=None) → 写了几段：让库里合 where 的正好是 chunks，只算缺的
fuse.py         reciprocal_rank(几列 id, k=60)、weighted(几列 (id, 分), 权重) → [(id, 分)]
metrics.py      一题的：recall_at(ranked, gold, k)、reciprocal_rank_of(ranked, gold)、ndcg_at(ranked, gold, k)，
                exact_match(答, 标准)、f1(答, 标准)；一批的：retrieval_row(各题的 ranked, 各题的 gold) → 一行指标；
                paired_bootstrap(甲, 乙) → (差, 低, 高)
corpus.py       people_daily_corpus、tiny_world_corpus、folder_corpus、cmrc_corpus → Corpus(name, documents, questions)
                tiny_world_corpus(篇, 题, anchors=3, seed=0, synonyms=0)：meta 里有 slot anchors matches literal；
                best_recall(题, k) 是任何检索最多能对多少；corpus.with_questions(改法)、corpus.describe()
                Document(id, text, meta)；Question(text, answer, gold, kind, meta)，gold 是有答案的文档的 id 的集合；
                load_corpus("people_daily" | "tiny_world" | 文件 | 文件夹, …)
documents.py    read_document(文件) → 文字；read_folder(文件夹) → ([Document], [毛病])：txt md html pdf docx csv；
                空的、扫描的 PDF，别的编码，压缩炸弹，都说清是哪个文件，别的文件照读
noise.py        typos(问题, rng)、to_traditional(文字)、to_simplified(文字)
rerank.py       load_reranker(…)、CrossEncoder（e5 的前几层）、TokenAligner（不要权重）：model(问题们, 段落们) → (N,) 分；
                rank(model, 问题, 段落们) → 位置，分高的在前
generate.py     load_generator("extract" | "chain" | "smollm2" | hub 名或文件夹 | "网址 模型名")
                .answer(问题们, 各题查到的几段文字) → [Answer(text, cited, .found)]
audit.py        AuditLog(文件).append(事件) ；.verify() 找出被改过的一行；每行带着前一行的散列

脚本里先 ``from nlp_common.base.cli import run_main``，再 ``from rag_common.store import open_store`` 等。
"""
