"""Prediction with trained models: model lookup, predictor, and the function behind lgssl_predict."""
