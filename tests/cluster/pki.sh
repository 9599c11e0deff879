# Keys, certificates and kubeconfigs of the cluster tier; sourced by `up`. All in $run/pki, valid for a few days.
# shellcheck shell=bash
pki=$run/pki

# certificate NAME SUBJECT [SUBJECT-ALT-NAMES]
certificate() {
  local name=$1 subject=$2 names=${3:-}
  openssl ecparam -name prime256v1 -genkey -noout -out "$pki/$name.key"
  openssl req -new -key "$pki/$name.key" -subj "$subject" -out "$pki/$name.csr"
  {
    echo 'extendedKeyUsage = clientAuth, serverAuth'
    [ -z "$names" ] || echo "subjectAltName = $names"
  } > "$pki/$name.ext"
  openssl x509 -req -in "$pki/$name.csr" -CA "$pki/ca.crt" -CAkey "$pki/ca.key" -CAcreateserial -days 3 \
    -extfile "$pki/$name.ext" -out "$pki/$name.crt" 2>/dev/null
}

# kubeconfig FILE CERTIFICATE-NAME
kubeconfig() {
  cat > "$1" <<YAML
apiVersion: v1
kind: Config
clusters:
- name: weft
  cluster: {server: "$api", certificate-authority-data: $(base64 -w0 "$pki/ca.crt")}
users:
- name: $2
  user: {client-certificate-data: $(base64 -w0 "$pki/$2.crt"), client-key-data: $(base64 -w0 "$pki/$2.key")}
contexts:
- name: weft
  context: {cluster: weft, user: $2}
current-context: weft
YAML
}

make_pki() {
  mkdir -p "$pki"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=weft-cluster \
    -keyout "$pki/ca.key" -out "$pki/ca.crt" 2>/dev/null
  openssl genrsa -out "$pki/service-account.key" 2048 2>/dev/null
  local names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local address
  for address in 127.0.0.1 "$v4.1" "${v6}1" ${kubernetes_service/,/ }; do names+=",IP:$address"; done
  certificate apiserver /CN=kube-apiserver "$names"
  certificate admin /O=system:masters/CN=admin
  certificate kube-controller-manager /CN=system:kube-controller-manager
  certificate kube-scheduler /CN=system:kube-scheduler
  certificate apiserver-kubelet /O=system:masters/CN=apiserver-kubelet
  local name
  for name in "${nodes[@]}"; do certificate "$name" "/O=system:nodes/CN=system:node:$name"; done
  for name in admin kube-controller-manager kube-scheduler; do kubeconfig "$run/$name.kubeconfig" $name; done
}
