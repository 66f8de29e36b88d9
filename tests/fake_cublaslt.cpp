// A stand-in for libcublasLt that computes on the CPU: the C functions that kernels/cuda/cublaslt.py calls, as NVIDIA documents them.
//
// Written from the documentation ("Using the cuBLASLt API": cublasLtMatmul, cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t, …) and
// cublasLt.h, not from the binding, so that both have to be right for a test to pass. Matrices are stored by columns. It is stricter than
// the library where that is free to be generous: what is documented as required is refused when missing; scratch memory is overwritten;
// an algorithm runs only the problem that it was found for, on pointers aligned as was promised then.
//
//     D = epilogue(alpha·op(A)·op(B) + beta·C)        sums in double, rounded once to D's type
//
// `fake_capture` and `fake_run` part a call in what is read from the host at once and what the device would do, for captured graphs.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum Epilogue {
    DEFAULT = 1, BIAS = 4, GELU = 32, GELU_AUX = 32 | 128, GELU_BIAS = 32 | 4, GELU_AUX_BIAS = 32 | 128 | 4, DGELU = 64 | 128,
    DGELU_BGRAD = 64 | 128 | 16, BGRADA = 256, BGRADB = 512,
};
const int COMPUTE_32F = 68, FAMILY_MASK = 7, ALIGNED = 256;

struct Desc {  // cublasLtMatmulDesc_t
    int32_t compute, scale, pointer_mode = 0, trans_a = 0, trans_b = 0, trans_c = 0;
    uint32_t epilogue = DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t bias_stride = 0, aux_ld = 0, aux_stride = 0;
    int32_t aux_type = -1, bias_type = -1;
};

struct Layout {  // cublasLtMatrixLayout_t
    int32_t type, order = 0;  // CUBLASLT_ORDER_COL
    uint64_t rows, columns;
    int64_t ld;
    int32_t batch = 1;
    int64_t stride = 0;
};

struct Preference {  // cublasLtMatmulPreference_t
    uint32_t search = 0;
    uint64_t workspace = 0;
    uint32_t reductions = FAMILY_MASK, align_a = ALIGNED, align_b = ALIGNED, align_c = ALIGNED, align_d = ALIGNED;
};

struct Algo { uint64_t data[8]; };  // cublasLtMatmulAlgo_t: here a digest of the problem, the alignments, the bytes of scratch memory

struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

struct Problem {  // everything that a call reads from the host
    Desc desc;
    Layout A, B, C, D;
    float alpha = 1, beta = 0;
    const void *a = nullptr, *b = nullptr, *c = nullptr;
    void *d = nullptr, *workspace = nullptr;
    size_t workspace_bytes = 0;
    int64_t m() const { return D.rows; }
    int64_t n() const { return D.columns; }
    int64_t k() const { return desc.trans_a ? A.rows : A.columns; }
};

// ---- numbers ----

static float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static double load(const void *p, int type, int64_t i) {
    if (type == R_32F) return ((const float *)p)[i];
    uint32_t h = ((const uint16_t *)p)[i];
    if (type == R_16BF) return from_bits(h << 16);
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double x = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h >> 15 ? -x : x;
}

static uint16_t half_bits(double x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (std::isnan(x)) return sign | 0x7E00;
    if (x >= 65520) return sign | 0x7C00;  // halfway from the largest number to where the next would be: to even, which is infinity
    int exponent;
    frexp(x, &exponent);
    int unit = std::fmax(exponent - 11, -24);  // the last place is worth 2^unit
    double scaled = nearbyint(ldexp(x, -unit));
    if (scaled == 2048) { scaled = 1024; unit++; }
    return sign | (scaled < 1024 ? (uint16_t)scaled : (uint16_t)((unit + 25) << 10 | ((int)scaled - 1024)));
}

static void store(void *p, int type, int64_t i, double value) {
    float x = (float)value;
    if (type == R_32F) { ((float *)p)[i] = x; return; }
    if (type == R_16F) { ((uint16_t *)p)[i] = half_bits(x); return; }
    uint32_t bits = to_bits(x);
    ((uint16_t *)p)[i] = std::isnan(x) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static double gelu(double x) { return 0.5 * x * (1 + tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

static double gelu_gradient(double x) {
    double t = tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

// ---- what is allowed ----

static bool has_bias(uint32_t e) { return e == BIAS || e == GELU_BIAS || e == GELU_AUX_BIAS || e == DGELU_BGRAD || e == BGRADA || e == BGRADB; }
static bool has_aux(uint32_t e) { return e == GELU_AUX || e == GELU_AUX_BIAS || e == DGELU || e == DGELU_BGRAD; }

static int check(const Problem &p) {
    const Desc &o = p.desc;
    for (const Layout *x : {&p.A, &p.B, &p.C, &p.D}) {
        if (!x->rows || !x->columns || x->ld < (int64_t)x->rows || x->batch != p.D.batch || x->batch < 1) return INVALID_VALUE;
        if (x->order) return NOT_SUPPORTED;
    }
    if (o.pointer_mode || o.trans_c || o.trans_a < 0 || o.trans_a > 1 || o.trans_b < 0 || o.trans_b > 1) return NOT_SUPPORTED;
    int64_t a_rows = o.trans_a ? p.A.columns : p.A.rows, b_rows = o.trans_b ? p.B.columns : p.B.rows;
    int64_t b_columns = o.trans_b ? p.B.rows : p.B.columns;
    if (a_rows != p.m() || b_rows != p.k() || b_columns != p.n()) return INVALID_VALUE;
    if (p.C.rows != p.D.rows || p.C.columns != p.D.columns || p.C.type != p.D.type) return INVALID_VALUE;
    if (p.D.batch > 1 && p.D.stride < p.m()) return INVALID_VALUE;  // results would overlap
    if (o.compute != COMPUTE_32F || o.scale != R_32F || p.A.type != p.B.type) return NOT_SUPPORTED;
    if (p.A.type != R_32F && p.A.type != R_16F && p.A.type != R_16BF) return NOT_SUPPORTED;
    if (p.D.type != p.A.type && p.D.type != R_32F) return NOT_SUPPORTED;
    if (o.bias_type != -1 && o.bias_type != p.D.type) return NOT_SUPPORTED;
    if (o.aux_type != -1 && o.aux_type != p.D.type) return NOT_SUPPORTED;
    if (o.epilogue != DEFAULT && o.epilogue != GELU && !has_bias(o.epilogue) && !has_aux(o.epilogue)) return INVALID_VALUE;
    if (has_aux(o.epilogue)) {
        if (o.aux_ld % 8 || o.aux_ld < p.m() || !o.aux) return INVALID_VALUE;
        if (p.D.batch > 1 && (o.aux_stride % 8 || !o.aux_stride)) return INVALID_VALUE;
    }
    return has_bias(o.epilogue) && !o.bias ? INVALID_VALUE : SUCCESS;
}

static uint64_t digest(const Problem &p) {  // FNV-1a
    uint64_t hash = 14695981039346656037u;
    auto add = [&](int64_t x) { for (int i = 0; i < 8; i++) hash = (hash ^ (x >> 8 * i & 255)) * 1099511628211u; };
    for (const Layout *x : {&p.A, &p.B, &p.C, &p.D}) {
        add(x->type); add(x->rows); add(x->columns); add(x->ld); add(x->batch); add(x->stride);
    }
    const Desc &o = p.desc;
    add(o.compute); add(o.trans_a); add(o.trans_b); add(o.epilogue); add(o.aux_ld); add(o.aux_stride);
    return hash;
}

static uint64_t alignment(const void *p) { uint64_t x = (uint64_t)p | ALIGNED; return x & -x; }

// ---- the product ----

static std::vector<double> matrix(const void *p, const Layout &x, int transposed, int64_t batch) {  // op(X), by columns
    int64_t rows = transposed ? x.columns : x.rows, columns = transposed ? x.rows : x.columns;
    std::vector<double> result(rows * columns);
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++)
            result[i + j * rows] = load(p, x.type, batch * x.stride + (transposed ? j + i * x.ld : i + j * x.ld));
    return result;
}

static void multiply(const Problem &p, int64_t batch) {
    const Desc &o = p.desc;
    const int64_t m = p.m(), n = p.n(), k = p.k();
    std::vector<double> a = matrix(p.a, p.A, !o.trans_a, batch), b = matrix(p.b, p.B, o.trans_b, batch), sums(m);  // a: k × m
    const int64_t bias = batch * o.bias_stride, aux = batch * o.aux_stride;
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            double x = 0;
            for (int64_t l = 0; l < k; l++) x += a[l + i * k] * b[l + j * k];
            x *= p.alpha;
            if (p.beta != 0) x += p.beta * load(p.c, p.C.type, batch * p.C.stride + i + j * p.C.ld);  // beta = 0: C is not read
            if (o.epilogue == BIAS || o.epilogue == GELU_BIAS || o.epilogue == GELU_AUX_BIAS) x += load(o.bias, p.D.type, bias + i);
            if (o.epilogue == GELU_AUX || o.epilogue == GELU_AUX_BIAS) store(o.aux, p.D.type, aux + i + j * o.aux_ld, x);
            if (o.epilogue & GELU) x = gelu(x);
            if (o.epilogue == DGELU || o.epilogue == DGELU_BGRAD) x *= gelu_gradient(load(o.aux, p.D.type, aux + i + j * o.aux_ld));
            sums[i] += x;
            store(p.d, p.D.type, batch * p.D.stride + i + j * p.D.ld, x);
        }
    for (int64_t i = 0; i < m && o.epilogue == DGELU_BGRAD; i++) store(o.bias, p.D.type, bias + i, sums[i]);
    for (int64_t i = 0; i < m && o.epilogue == BGRADA; i++) {
        double x = 0;
        for (int64_t l = 0; l < k; l++) x += a[l + i * k];
        store(o.bias, p.D.type, bias + i, x);
    }
    for (int64_t j = 0; j < n && o.epilogue == BGRADB; j++) {
        double x = 0;
        for (int64_t l = 0; l < k; l++) x += b[l + j * k];
        store(o.bias, p.D.type, bias + j, x);
    }
}

// ---- the library's functions ----

static int handle_of_all;

template <class T> static int set(T &field, const void *value, size_t size) {
    if (!value || size != sizeof(T)) return INVALID_VALUE;
    memcpy(&field, value, size);
    return SUCCESS;
}

extern "C" {

size_t cublasLtGetVersion() { return 130100; }

int cublasLtCreate(void **handle) { *handle = &handle_of_all; return SUCCESS; }

int cublasLtMatmulDescCreate(Desc **desc, int compute, int scale) {
    *desc = new Desc;
    (*desc)->compute = compute;
    (*desc)->scale = scale;
    return SUCCESS;
}

int cublasLtMatmulDescDestroy(Desc *desc) { delete desc; return SUCCESS; }

int cublasLtMatmulDescSetAttribute(Desc *desc, int attribute, const void *value, size_t size) {
    switch (attribute) {
        case 0: return set(desc->compute, value, size);
        case 1: return set(desc->scale, value, size);
        case 2: return set(desc->pointer_mode, value, size);
        case 3: return set(desc->trans_a, value, size);
        case 4: return set(desc->trans_b, value, size);
        case 5: return set(desc->trans_c, value, size);
        case 7: return set(desc->epilogue, value, size);
        case 8: return set(desc->bias, value, size);
        case 10: return set(desc->bias_stride, value, size);
        case 11: return set(desc->aux, value, size);
        case 12: return set(desc->aux_ld, value, size);
        case 13: return set(desc->aux_stride, value, size);
        case 22: return set(desc->aux_type, value, size);
        case 26: return set(desc->bias_type, value, size);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    *layout = new Layout;
    (*layout)->type = type;
    (*layout)->rows = rows;
    (*layout)->columns = columns;
    (*layout)->ld = ld;
    return SUCCESS;
}

int cublasLtMatrixLayoutDestroy(Layout *layout) { delete layout; return SUCCESS; }

int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value, size_t size) {
    switch (attribute) {
        case 0: return set(layout->type, value, size);
        case 1: return set(layout->order, value, size);
        case 2: return set(layout->rows, value, size);
        case 3: return set(layout->columns, value, size);
        case 4: return set(layout->ld, value, size);
        case 5: return set(layout->batch, value, size);
        case 6: return set(layout->stride, value, size);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatmulPreferenceCreate(Preference **preference) { *preference = new Preference; return SUCCESS; }

int cublasLtMatmulPreferenceDestroy(Preference *preference) { delete preference; return SUCCESS; }

int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t size) {
    switch (attribute) {
        case 0: return set(preference->search, value, size);
        case 1: return set(preference->workspace, value, size);
        case 3: return set(preference->reductions, value, size);
        case 5: return set(preference->align_a, value, size);
        case 6: return set(preference->align_b, value, size);
        case 7: return set(preference->align_c, value, size);
        case 8: return set(preference->align_d, value, size);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, Desc *desc, Layout *A, Layout *B, Layout *C, Layout *D, Preference *preference, int wanted,
                                   HeuristicResult *results, int *found) {
    *found = 0;
    if (handle != &handle_of_all) return NOT_INITIALIZED;
    if (wanted < 1 || !desc || !A || !B || !C || !D || !preference) return INVALID_VALUE;
    Problem p;
    p.desc = *desc; p.A = *A; p.B = *B; p.C = *C; p.D = *D;
    if (int status = check(p)) return status;
    size_t workspace = preference->workspace < 4096 ? preference->workspace : 4096;
    results[0] = HeuristicResult{};
    results[0].algo = Algo{{digest(p), preference->align_a, preference->align_b, preference->align_c, preference->align_d,
                            alignment(desc->bias), alignment(desc->aux), workspace}};
    results[0].workspace = workspace;
    *found = 1;
    return SUCCESS;
}

int fake_capture(void *handle, Desc *desc, const float *alpha, const void *a, Layout *A, const void *b, Layout *B, const float *beta,
                 const void *c, Layout *C, void *d, Layout *D, const Algo *algo, void *workspace, size_t bytes, void *stream, Problem **out) {
    if (handle != &handle_of_all) return NOT_INITIALIZED;
    if (!desc || !A || !B || !D || !alpha || !beta || !a || !b || !c || !d || !algo) return INVALID_VALUE;
    Problem p;
    p.desc = *desc; p.A = *A; p.B = *B; p.C = C ? *C : *D; p.D = *D;
    p.alpha = *alpha; p.beta = *beta;
    p.a = a; p.b = b; p.c = c; p.d = d; p.workspace = workspace; p.workspace_bytes = bytes;
    if (int status = check(p)) return status;
    if (c == d && memcmp(&p.C, &p.D, sizeof(Layout))) return INVALID_VALUE;  // in place: the same layout
    const uint64_t *know = algo->data;
    const uint64_t aligned[] = {alignment(a), alignment(b), alignment(c), alignment(d), alignment(desc->bias), alignment(desc->aux)};
    for (int i = 0; i < 6; i++)
        if (aligned[i] < know[i + 1]) return INVALID_VALUE;
    if (know[0] != digest(p) || bytes < know[7]) return INVALID_VALUE;
    if (bytes && (!workspace || (uint64_t)workspace % 256)) return INVALID_VALUE;
    *out = new Problem(p);
    return SUCCESS;
}

void fake_run(const Problem *p) {
    memset(p->workspace, 0xA5, p->workspace_bytes < 4096 ? p->workspace_bytes : 4096);
    for (int64_t batch = 0; batch < p->D.batch; batch++) multiply(*p, batch);
}

int cublasLtMatmul(void *handle, Desc *desc, const float *alpha, const void *a, Layout *A, const void *b, Layout *B, const float *beta,
                   const void *c, Layout *C, void *d, Layout *D, const Algo *algo, void *workspace, size_t bytes, void *stream) {
    Problem *p;
    if (int status = fake_capture(handle, desc, alpha, a, A, b, B, beta, c, C, d, D, algo, workspace, bytes, stream, &p)) return status;
    fake_run(p);
    delete p;
    return SUCCESS;
}
}
