"""Attention of the text rows to an image: what it looks at and what it trains."""

import torch
import torch.nn.functional as F

from engine.step import View
from models.heads.text_attention import TextAttention
from tests.records import an_output


def test_it_looks_at_the_embedding_without_training_it_or_at_the_tower_where_there_is_one():
    head = TextAttention(joint=8, layers=1, width=16, heads=2)
    torch.nn.init.ones_(head.gamma)
    text, embedding = F.normalize(torch.randn(4, 8), dim=1), torch.randn(2, 8, 3, 3)
    embedding.requires_grad_()
    output = an_output(embedding=embedding)
    head(View(None, text=text), None, output, 0)
    output.text.square().mul(torch.arange(8.0)).sum().backward()
    assert embedding.grad is None and head.gamma.grad.any()
    torch.testing.assert_close(output.text, head.attend(text, F.normalize(embedding, dim=1)))
    dense = torch.randn(2, 8, 5, 5)
    head(View(None, text=text, dense=dense), None, output, 0)
    torch.testing.assert_close(output.text, head.attend(text, dense))


def test_without_text_it_makes_nothing():
    output = an_output(embedding=torch.randn(2, 8, 3, 3))
    TextAttention(joint=8, width=16, heads=2)(View(None), None, output, 0)
    assert output.text is None
