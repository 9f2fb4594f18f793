module tarn/bench

go 1.26.0
