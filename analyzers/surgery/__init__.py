"""Operations on a model: layers and heads left out, repeated, reordered, replaced; what each of them is worth; exports."""
