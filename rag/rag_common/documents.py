"""读者自己的文件 → 文字：在 nlp_common/data/documents.py，几个主题都用。"""

from nlp_common.data.documents import Document, read_document, read_folder

__all__ = ["Document", "read_document", "read_folder"]
