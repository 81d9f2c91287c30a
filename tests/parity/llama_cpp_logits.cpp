// Logits of a model under llama.cpp with a control vector: MODEL.gguf VECTOR.gguf|- OUT ID... writes [n, vocab] float32.
#include <cstdio>
#include <cstdlib>

#include "common.h"
#include "llama.h"

int main(int argc, char ** argv) {
    llama_backend_init();
    llama_model * model = llama_load_model_from_file(argv[1], llama_model_default_params());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = GGML_TYPE_F32;  // values are kept in float16
    llama_context * context = llama_new_context_with_model(model, params);
    if (argv[2][0] != '-') {  // as its command line does for --control-vector
        const auto vector = llama_control_vector_load({{1.0f, argv[2]}});
        if (vector.n_embd == -1 ||
            llama_control_vector_apply(context, vector.data.data(), vector.data.size(), vector.n_embd, 1, llama_n_layer(model))) {
            return 1;
        }
    }
    const int n = argc - 4;
    llama_batch batch = llama_batch_init(n, 0, 1);
    for (int i = 0; i < n; i++) {
        llama_batch_add(batch, atoi(argv[4 + i]), i, {0}, true);
    }
    if (llama_decode(context, batch)) {
        return 2;
    }
    FILE * out = fopen(argv[3], "wb");
    for (int i = 0; i < n; i++) {
        fwrite(llama_get_logits_ith(context, i), sizeof(float), llama_n_vocab(model), out);
    }
    fclose(out);
    return 0;
}
