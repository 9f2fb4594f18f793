{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{- define "tarn.container" -}}
- name: tarn
  image: {{ include "tarn.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if .Values.hosts.enabled }}
  restartPolicy: Always
  {{- end }}
  args:
    - serve
    {{- range .Values.extraArgs }}
    - {{ . | quote }}
    {{- end }}
  env:
    # In the environment, so that the commands of kubectl exec have it, too.
    - {name: TARN_CONFIG, value: /etc/tarn/config/tarn.yaml}
    - name: TARN_INSTANCE
      valueFrom: {fieldRef: {fieldPath: metadata.uid}}
    {{- with .Values.extraEnv }}{{ toYaml . | nindent 4 }}{{ end }}
  securityContext:
    {{- $user := ternary (int .Values.user) 0 .Values.prepare }}
    runAsUser: {{ $user }}
    runAsGroup: {{ $user }}
    {{- if $user }}
    runAsNonRoot: true
    {{- end }}
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
  # The kubelet asks from the node, so it reaches the node's loopback. None of the three
  # depends on a registry or on the disk.
  startupProbe:
    httpGet: {host: 127.0.0.1, port: {{ .Values.ports.admin }}, path: /healthz}
    periodSeconds: 1
    failureThreshold: 120
  livenessProbe:
    httpGet: {host: 127.0.0.1, port: {{ .Values.ports.admin }}, path: /healthz}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    httpGet: {host: 127.0.0.1, port: {{ .Values.ports.admin }}, path: /readyz}
    periodSeconds: 5
    timeoutSeconds: 5
  resources: {{- toYaml .Values.resources | nindent 4 }}
  volumeMounts:
    - {name: data, mountPath: /var/lib/tarn}
    - {name: config, mountPath: /etc/tarn/config, readOnly: true}
    - {name: socket, mountPath: /run/tarn}
    {{- range $i, $f := .Values.files }}
    - {name: files-{{ $i }}, mountPath: {{ $f.path | quote }}, readOnly: true}
    {{- end }}
    {{- with .Values.extraVolumeMounts }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}
