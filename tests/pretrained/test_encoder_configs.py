"""config.json of DeBERTa, MPNet, ALBERT, NomicBERT: what published ones mean, and one line for what is not supported."""

import numpy as np
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.models.disentangled import distance_buckets, distance_rows
from mtl_jax.pretrained import albert, deberta_v2, eurobert_family, families, mpnet, nomic_gte

# Those of the base sizes as they are published, apart from fields that no program reads.
DEBERTA_V3 = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 0,
    "vocab_size": 128100,
    "pooler_hidden_size": 768,
}
ALBERT = {"model_type": "albert", "vocab_size": 30000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
ALBERT |= {"intermediate_size": 3072, "max_position_embeddings": 512, "embedding_size": 128}
MPNET = ALBERT | {"model_type": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514}
# The published form, and what of it is not the default of the form of transformers.
NOMIC = {"model_type": "nomic_bert", "vocab_size": 30528, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072}
NOMIC |= {"n_positions": 8192, "activation_function": "swiglu", "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0}
NOMIC |= {"layer_norm_epsilon": 1e-12, "prenorm": False, "rotary_scaling_factor": None, "type_vocab_size": 2}

# Of 210 million parameters, as published.
EURO = {"model_type": "eurobert", "vocab_size": 128256, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
EURO |= {"num_key_value_heads": 12, "head_dim": 64, "intermediate_size": 3072, "max_position_embeddings": 8192}
EURO |= {"rope_theta": 250000, "rope_scaling": None, "rms_norm_eps": 1e-05, "clf_pooling": "late", "hidden_act": "silu"}
EURO |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "pad_token_id": 128001}


def test_published_deberta():
    cfg = deberta_v2.config(DEBERTA_V3, "config.json")
    assert (cfg.span, cfg.longest_distance, cfg.max_length) == (256, 512, 512)
    assert all((cfg.content_to_position, cfg.position_to_content, cfg.shared_projections, cfg.norm_distances))
    assert not any((cfg.absolute_positions, cfg.convolution, cfg.type_vocab_size))
    assert cfg.scale == pytest.approx((64 * 3) ** -0.5)
    listed = deberta_v2.config(DEBERTA_V3 | {"pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "none|layer_norm"}, "config.json")
    assert listed == cfg
    plain = deberta_v2.config(DEBERTA_V3 | {"relative_attention": False, "pos_att_type": None}, "config.json")
    assert (plain.span, plain.scale) == (0, 64**-0.5)


def test_distances_by_hand():
    """Up to 4 each has its own of 8 buckets; from there to 23 the ceiling of 3 log(d / 4) / log(23 / 4) is added to 4."""
    found = distance_buckets(np.array([0, 1, -4, 5, 7, 8, -12, 13, 22, 23, 24, -40]), 8, 24)
    np.testing.assert_array_equal(found, [0, 1, -4, 5, 5, 6, -6, 7, 7, 7, 8, -8])
    rows, of_distance = distance_rows(8, 24, 30)
    assert rows == range(0, 16)  # both ends are cut to the table
    assert [of_distance[29 + d] for d in (-29, -4, 0, 29)] == [0, 4, 8, 15]
    rows, of_distance = distance_rows(256, 512, 3)
    assert (rows, of_distance.tolist()) == (range(254, 259), [0, 1, 2, 3, 4])


def test_shared_layers():
    cfg = albert.config(ALBERT | {"num_hidden_layers": 5, "num_hidden_groups": 2, "inner_group_num": 2}, "config.json")
    assert cfg.layer_of_depth == (0, 1, 0, 1, 0, 1, 2, 3, 2, 3)
    name = "encoder.albert_layer_groups.1.albert_layers.0.attention.dense.weight"
    assert albert.names("trunk/layer_2/attention/output/kernel", cfg) == [name]
    assert (cfg.activation, cfg.dropout, cfg.projects, cfg.is_plain) == ("gelu_new", 0.0, True, False)
    assert albert.config(ALBERT | {"embedding_size": 768}, "config.json").projects


def test_positions_of_mpnet_begin_behind_row_1_whatever_pads():
    cfg = mpnet.config(MPNET | {"pad_token_id": 0}, "config.json")
    assert (cfg.first_position, cfg.max_length, cfg.type_vocab_size, cfg.relative_buckets) == (2, 512, 0, 32)


def test_both_forms_of_nomic_say_the_same():
    cfg = nomic_gte.nomic_config(NOMIC, "config.json")
    newer = {"model_type": "nomic_bert", "vocab_size": 30528, "type_vocab_size": 2} | nomic_gte.nomic_fields(cfg)
    assert nomic_gte.nomic_config(newer, "config.json") == cfg
    assert (cfg.theta, cfg.max_length, cfg.activation, cfg.joined_gate) == (1000.0, 8192, "silu", False)
    # What is saved of the older form is read by its newer names.
    assert nomic_gte.nomic_config(newer | NOMIC, "config.json") == cfg


def test_both_forms_of_eurobert_say_the_same():
    cfg = eurobert_family.config(EURO, "config.json")
    assert (cfg.rope.theta, cfg.head_pooling, cfg.norm_eps, cfg.max_length, cfg.tied) == (250_000.0, "late", 1e-5, 8192, False)
    newer = EURO | {"rope_parameters": {"rope_type": "default", "rope_theta": 250000}, "rope_theta": None}
    assert eurobert_family.config(newer | {"clf_pooling": None, "classifier_pooling": "late"}, "config.json") == cfg
    assert eurobert_family.config(EURO | {"clf_pooling": "mean"}, "config.json").head_pooling == "mean"


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (EURO, {"clf_pooling": "max"}, "unknown clf_pooling in config.json: 'max'; choices: late, mean, bos"),
        (EURO, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic; default, linear and llama3"),
        (DEBERTA_V3, {"pos_att_type": "p2c|p2p"}, r"unknown pos_att_type in config.json: 'p2p'"),
        (DEBERTA_V3, {"pos_att_type": 3}, "pos_att_type is 3; it must be a list of words"),
        (DEBERTA_V3, {"norm_rel_ebd": "batch_norm"}, "unknown norm_rel_ebd in config.json: 'batch_norm'"),
        (DEBERTA_V3, {"z_steps": 2}, "z_steps is 2; further runs of the last layer are not supported"),
        (DEBERTA_V3, {"conv_kernel_size": 4}, "conv_kernel_size is 4; it must be odd"),
        (DEBERTA_V3, {"conv_kernel_size": 3, "conv_groups": 5}, "conv_groups is 5; it must divide hidden_size, 768"),
        (DEBERTA_V3, {"conv_act": "mish"}, "unknown conv_act in config.json: 'mish'"),
        (DEBERTA_V3, {"attention_head_size": 32}, "attention_head_size is 32; it must be 64"),
        (DEBERTA_V3, {"pooler_hidden_size": 10}, "pooler_hidden_size is 10; it must be 768"),
        (DEBERTA_V3, {"legacy": False, "embedding_size": 128}, "legacy is false and embedding_size 128"),
        (
            DEBERTA_V3,
            {"max_relative_positions": 100},
            "position_buckets is 256; it must be at least 2, and half of it below .* 100",
        ),
        (DEBERTA_V3, {"position_buckets": 1}, "position_buckets is 1; it must be at least 2"),
        (DEBERTA_V3, {"position_biased_input": 1}, "position_biased_input is 1; it must be true or false"),
        (MPNET, {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64; only 32"),
        (ALBERT, {"num_hidden_groups": 13}, "num_hidden_groups is 13; it must be at most num_hidden_layers, 12"),
        (ALBERT, {"inner_group_num": 500}, "inner_group_num is 500; times num_hidden_layers, 12, it is beyond 1000"),
        (ALBERT, {"hidden_act": "relu6"}, "unknown hidden_act in config.json: 'relu6'"),
        (NOMIC, {"prenorm": True}, "prenorm is True; False is supported"),
        (NOMIC, {"rotary_scaling_factor": 2}, "rotary_scaling_factor is 2; none is supported"),
        (
            NOMIC,
            {"rope_parameters": {"rope_type": "yarn"}},
            "scaled rotary positions .rope_scaling, rope_type. are not supported",
        ),
        (MPNET, {"model_type": "gte", "head_dim": 32}, "head_dim is 32; it must be 64"),
        (MPNET, {"model_type": "gte", "num_attention_heads": 256}, "attention heads of size 3; rotary positions need"),
        (ALBERT, {"model_type": "deberta-v3"}, r"unknown model_type in config.json: 'deberta-v3' \(did you mean 'deberta-v2'"),
        (ALBERT, {"model_type": "deberta"}, r"unknown model_type in config.json: 'deberta' \(did you mean 'deberta-v2'"),
    ],
)
def test_one_line_that_names_the_field(raw, change, message):
    with pytest.raises(UserError, match=message) as caught:
        families.of(raw | change, "config.json").config(raw | change, "config.json")
    assert "\n" not in str(caught.value)
